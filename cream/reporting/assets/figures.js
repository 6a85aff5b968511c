// Draw each figure when it comes near the window: `data-from` names the data that have it, by its id.
const sources = {};
const draw = async (place) => {
  try {
    const [figures] = await Promise.all([sources[place.dataset.from] ??= page.data(place.dataset.from), page.library("plotly")]);
    const { data, layout } = figures[place.id];
    await Plotly.newPlot(place, data, layout, { displayModeBar: false, responsive: true, doubleClick: false });
  } catch (error) {
    place.textContent = `This figure cannot be drawn here (${error.message}); its numbers are in the table below.`;
    throw error;
  }
};
const near = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    near.unobserve(target);
    draw(target);
  }
}, { rootMargin: "100% 0px" });
document.querySelectorAll(".plot").forEach((place) => near.observe(place));
