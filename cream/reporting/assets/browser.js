// The browser of preferences (cream/reporting/browser.py writes its data). An index of rows, one a pair or a prompt
// without one, is filtered and sorted as typed arrays; only the rows in view are in the document. Texts are in blocks,
// which are unpacked when a prompt is shown or searched. Texts of others become text nodes, never markup.

const ROW = 60;  // pixels, as in browser.css
const LONG = 3000;  // characters of a text that are shown at first
const KEPT = 6;  // unpacked blocks that are held
const SLICE = 10;  // milliseconds of searching between two looks at the user's input
const RANGES = ["c_min", "c_max", "margin_min", "margin_max"];
const FILTERS = ["round", "task", "source", "shown", "chosen", "rejected", ...RANGES];
const FIELDS = ["q", "sort", ...FILTERS];
const root = document.getElementById("preferences");
const part = (name) => root.querySelector(`[data-part="${name}"]`);
const form = root.querySelector("form");
const list = part("list");

let index;  // groups, tasks, rows by column
let rows = new Int32Array(0);  // the rows that match, in order
let selected = -1;  // a row of the index; -1: none, -2: the address names one that is not in this page
let touched = false;  // the page's address follows what is shown once the user has touched anything
let pinned = false;  // the address named it: it stays, even if it does not match
let hits = null;  // by prompt: 1 where its texts have the searched words; null: nothing is searched

// Elements -------------------------------------------------------------------------------------------------------

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...present(children));
  return made;
}

const present = (children) => children.filter((child) => child !== null && child !== undefined);

// A text in its own direction, so that marks in it cannot reorder what is around it.
const isolated = (text) => element("bdi", { textContent: text });

// A text as nodes, the searched words marked.
function marked(text) {
  const needle = form.q.value.toLowerCase(), lower = text.toLowerCase(), nodes = [];
  if (!needle || lower.length !== text.length) return [text];
  let from = 0;
  for (let at; (at = lower.indexOf(needle, from)) >= 0 && nodes.length < 2000; from = at + needle.length) {
    nodes.push(text.slice(from, at), element("mark", { textContent: text.slice(at, at + needle.length) }));
  }
  return [...nodes, text.slice(from)];
}

function block(text) {
  const made = element("div", { className: "browser-text", dir: "auto" }, ...marked(text.slice(0, LONG)));
  if (text.length <= LONG) return made;
  const more = element("button", { type: "button", textContent: `show all ${count(text.length)} characters` });
  more.addEventListener("click", () => { made.replaceChildren(...marked(text)); more.remove(); });
  return element("div", {}, made, more);
}

function number(value, digits = 4) {
  return Number.isFinite(value) ? String(+value.toPrecision(digits)).replace("-", "−") : "–";
}

const numbers = (values) => [values].flat().map((value) => number(value)).join(", ");
const count = (value) => value.toLocaleString("en").replaceAll(",", "\u202f");  // as in the page's tables
const soft = (text) => element("p", { className: "soft", textContent: text });

// What somebody said, under their name.
function said(name, text) {
  return element("div", { className: "browser-turn" }, element("span", {}, isolated(name)), block(text));
}

// Names and values as a list of definitions.
function pairsOf(facts) {
  const line = ([name, value]) => element("div", {}, element("dt", {}, isolated(name)), element("dd", {}, value));
  return element("dl", { className: "browser-numbers" }, ...facts.map(line));
}

// Texts ----------------------------------------------------------------------------------------------------------

const blocks = new Map();  // number -> its columns, the last used last
const haystacks = [];  // by block, promised: all texts in lower case, and where each prompt begins

async function unpacked(at) {
  const value = blocks.get(at) || (await page.data(`preferences-${at}`));
  blocks.delete(at);
  blocks.set(at, value);
  if (blocks.size > KEPT) blocks.delete(blocks.keys().next().value);
  return value;
}

// A prompt of a block as one object: {prompt, responses, reward, ...} with strings in place of their numbers.
function promptOf(value, at) {
  const text = (number) => (number === null ? null : value.strings[number]);
  const found = Object.fromEntries(Object.entries(value).map(([name, column]) => [name, column[at] ?? null]));
  found.prompt = found.prompt.map((each, at) => (at % 2 ? text(each) : each));
  found.responses = found.responses.map(text);
  found.reason = (found.reason || []).map(text);
  found.texts = Object.entries(found.texts || {}).map(([name, each]) => [name, each.map(text)]);
  return found;
}

const haystack = (at) => (haystacks[at] ??= makeHaystack(at));

async function makeHaystack(at) {
  const value = await page.data(`preferences-${at}`);
  const lower = value.strings.map((text) => text.toLowerCase());
  const pieces = [], starts = new Int32Array(value.prompt.length + 1);
  let length = 0;
  for (let item = 0; item < value.prompt.length; item++) {
    starts[item] = length;
    const turns = value.prompt[item].filter((_, at) => at % 2);
    const own = [...turns, ...value.responses[item], ...Object.values(value.texts?.[item] || {}).flat()];
    for (const each of new Set(own)) {
      if (each === null) continue;
      pieces.push(lower[each]);
      length += lower[each].length + 1;
    }
  }
  starts[value.prompt.length] = length;
  return { text: pieces.join("\u0001"), starts };
}

// Marks the prompts of a block whose texts have the needle; a prompt that has it is left at once.
function searchBlock({ text, starts }, needle, first) {
  let item = 0;
  for (let at = text.indexOf(needle); at >= 0; at = text.indexOf(needle, starts[item])) {
    while (starts[item + 1] <= at) item++;
    hits[first + item] = 1;
    item++;
  }
}

let searches = 0;
async function search() {
  const turn = ++searches, needle = form.q.value.toLowerCase();
  list.ariaBusy = "true";
  if (!needle) {
    hits = null;
    return show();
  }
  const found = (hits = new Uint8Array(index.starts.at(-1)));
  const { uuid, item } = index.rows;
  for (let row = 0; row < uuid.length; row++) if (uuid[row].toLowerCase().includes(needle)) hits[item[row]] = 1;
  let since = performance.now();
  for (let at = 0; at < index.blocks.length; at++) {
    const hay = await haystack(at);
    if (turn !== searches) return;
    hits = found;
    searchBlock(hay, needle, index.starts[at]);
    if (performance.now() - since > SLICE && at + 1 < index.blocks.length) {
      show(`searched ${Math.round((100 * at) / index.blocks.length)} %: `);
      await new Promise((resolve) => setTimeout(resolve));
      if (turn !== searches) return;
      since = performance.now();
    }
  }
  show();
}

// Filters --------------------------------------------------------------------------------------------------------

const settings = () => Object.fromEntries(FIELDS.map((name) => [name, form[name].value]));

function matching() {
  const { group, task, source, c, margin, chosen, chosen_right, rejected_right, item } = index.rows;
  const wanted = settings();
  const tests = [];
  const equal = (column, value, names) => value && tests.push((row) => column[row] === names.indexOf(value));
  const within = (column, low, high) => {
    if (low !== "") tests.push((row) => column[row] >= low);
    if (high !== "") tests.push((row) => column[row] <= high);
  };
  const right = (column, value) => value && tests.push((row) => column[row] === (value === "-" ? null : +value));
  equal(group, wanted.round, index.groups.map((each) => each.title));
  equal(task, wanted.task, index.rows.tasks);
  equal(source, wanted.source, index.sources);
  if (wanted.shown !== "all") tests.push(wanted.shown ? (row) => chosen[row] === null : (row) => chosen[row] !== null);
  right(chosen_right, wanted.chosen);
  right(rejected_right, wanted.rejected);
  within(c, wanted.c_min, wanted.c_max);
  within(margin, wanted.margin_min, wanted.margin_max);
  if (hits) tests.push((row) => hits[item[row]]);
  const found = [];
  for (let row = 0; row < item.length; row++) if (tests.every((test) => test(row))) found.push(row);
  const made = Int32Array.from(found);
  const key = { c, margin }[wanted.sort.replace("-", "")], sign = wanted.sort.startsWith("-") ? -1 : 1;
  if (!key) return made;
  const last = (row) => Number.isNaN(key[row]);  // without a number: at the end
  return made.sort((a, b) => last(a) - last(b) || sign * (key[a] - key[b]) || a - b);
}

function show(prefix = "") {
  rows = matching();
  const active = FILTERS.filter((name) => form[name].value).length;
  part("active").textContent = active ? `(${active} set)` : "";
  const noun = { none: "prompts without a pair", all: "pairs and prompts without one" }[form.shown.value] || "pairs";
  const total = index.rows.item.length;
  const all = { none: total - index.pairs, all: total }[form.shown.value] ?? index.pairs;
  part("count").textContent = `${prefix}${count(rows.length)} of ${count(all)} ${noun}`;
  part("rows").style.height = `${rows.length * ROW}px`;
  if (prefix) return paint();
  list.ariaBusy = "false";
  select(pinned ? selected : rows.length ? rows[0] : -1);
}

let searched = "";
function changed() {
  list.scrollTop = 0;
  if (form.q.value.toLowerCase() === searched) return show();
  searched = form.q.value.toLowerCase();
  return search();
}

// List -----------------------------------------------------------------------------------------------------------

const CORRECT = { 1: "✓ right", 0: "✗ wrong" };

function rowElement(at) {
  const row = rows[at], { snippet, c, margin, chosen, chosen_right, rejected_right, task, group } = index.rows;
  const facts = [];
  if (chosen[row] === null) facts.push("no pair");
  else {
    if (!Number.isNaN(c[row])) facts.push(`C ${number(c[row], 2)}`);
    if (!Number.isNaN(margin[row])) facts.push(`margin ${number(margin[row], 3)}`);
    const sides = [chosen_right[row], rejected_right[row]];
    const marks = sides.map((each) => (CORRECT[each] || "?")[0]);
    if (marks.some((each) => each !== "?")) facts.push(marks.join(" over "));
  }
  if (index.rows.tasks.length > 1) facts.push(index.rows.tasks[task[row]]);
  if (index.groups.length > 1) facts.push(index.groups[group[row]].title);
  return element("div", {
    className: "browser-row", id: `preference-row-${row}`, role: "option", ariaSelected: String(row === selected),
    ariaSetSize: String(rows.length), ariaPosInSet: String(at + 1), style: `top: ${at * ROW}px`,
  }, element("span", { className: "browser-snippet", dir: "auto", textContent: snippet[row] }),
  element("span", { className: "browser-facts" }, ...facts.flatMap((fact, at) => [at ? " · " : "", isolated(fact)])));
}

function paint() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 3);
  const last = Math.min(rows.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 3);
  const made = [];
  for (let at = first; at < last; at++) made.push(rowElement(at));
  part("rows").replaceChildren(...made);
  const active = document.getElementById(`preference-row-${selected}`);
  if (active) list.setAttribute("aria-activedescendant", active.id);
  else list.removeAttribute("aria-activedescendant");
}

// Selects a row of the index: scrolls the list so that it is in view, and shows its prompt.
function select(row) {
  selected = row;
  const top = rows.indexOf(row) * ROW;
  if (top >= 0 && top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  paint();
  if (touched) history.replaceState(null, "", address(selected));
  detail();
}

function move(step) {
  const at = rows.indexOf(selected), to = at < 0 ? 0 : Math.min(rows.length - 1, Math.max(0, at + step));
  if (rows.length) select(rows[to]);
}

// Address --------------------------------------------------------------------------------------------------------

function address(row) {
  const filters = Object.entries(settings()).filter(([name, value]) => value && name !== "round");
  const round = form.round.value ? [["round", form.round.value]] : [];
  const pair = row >= 0 ? [["pair", index.rows.uuid[row]]] : [];
  if (row >= 0 && !round.length && index.groups.length > 1) pair.push(["of", index.groups[index.rows.group[row]].title]);
  return `#${new URLSearchParams([...pair, ...round, ...filters])}`;
}

// Shows what the page's address says; false where it speaks of something else.
function recall() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (!location.hash.includes("=") || !["pair", ...FIELDS].some((name) => given.has(name))) return false;
  for (const name of FIELDS) form[name].value = given.get(name) || "";
  for (const name of FIELDS) if (form[name].selectedIndex === -1) form[name].value = "";
  const { uuid, group } = index.rows, title = given.get("round") || given.get("of");
  const wanted = given.get("pair");
  selected = uuid.findIndex((each, row) => each === wanted && (!title || index.groups[group[row]].title === title));
  touched = true;
  pinned = wanted !== null;
  if (pinned && selected < 0) selected = -2;
  if (FILTERS.some((name) => form[name].value)) part("filters").open = true;
  changed();
  root.scrollIntoView();
  return true;
}

// Detail ---------------------------------------------------------------------------------------------------------

// Ranks of the responses that are ranked, from 1; ties share the better rank.
function ranks(values, ranked) {
  const found = values.map(() => null);
  for (const at of ranked) found[at] = 1 + ranked.filter((other) => values[other] > values[at]).length;
  return found;
}

const letter = (at) => (at < 26 ? String.fromCharCode(65 + at) : `${at + 1}`);

function head() {
  const at = rows.indexOf(selected), place = part("place");
  if (!place) return;
  place.textContent = at < 0 ? "does not match" : `${count(at + 1)} of ${count(rows.length)}`;
  part("pair").querySelector("a").href = address(selected);
  for (const [name, end] of [["previous", 0], ["next", rows.length - 1]]) part(name).disabled = at === end;
}

async function detail() {
  const row = selected, columns = index.rows, item = columns.item[row];
  if (row < 0) {
    part("pair").replaceChildren(soft(row === -1 ? "Nothing matches." : "This page does not have the pair of its address."));
    return;
  }
  let at = 0;
  while (index.starts[at + 1] <= item) at++;
  const found = promptOf(await unpacked(at), item - index.starts[at]);
  if (row !== selected) return;
  const group = index.groups[columns.group[row]];
  const pair = { chosen: columns.chosen[row], rejected: columns.rejected[row] };
  const side = (at) => (at === pair.chosen ? "chosen" : at === pair.rejected ? "rejected" : "");
  const turn = (name, label, step) => {
    const made = element("button", { type: "button", textContent: label, "data-part": name });
    made.addEventListener("click", () => { touched = true; move(step); });
    return made;
  };
  const values = [["C", columns.c[row]], ["τ", columns.tau[row]], ["margin", columns.margin[row]]];
  const texts = [["task", columns.tasks[columns.task[row]]], ["round", group.title], ["source", group.source]];
  const facts = values.filter(([, value]) => Number.isFinite(value)).map(([name, value]) => [name, number(value)]);
  facts.push(...texts.map(([name, text]) => [name, isolated(text)]));
  const scroll = part("pair");
  const focused = scroll.contains(document.activeElement) ? document.activeElement.dataset.part : null;
  const link = element("a", { textContent: "link", title: "the address of this pair with these filters" });
  const place = element("span", { className: "soft", "data-part": "place" });
  const turns = found.prompt.flatMap((text, at) => (at % 2 ? [said(found.prompt[at - 1], text)] : []));
  scroll.replaceChildren(...present([
    element("div", { className: "browser-head" },
      element("h3", {}, isolated(columns.uuid[row])),
      element("div", {}, turn("previous", "previous", -1), place, turn("next", "next", 1), link)),
    pairsOf(facts),
    columns.c[row] < 0.5 ? soft("C is below ½: training with C prefers the rejected response.") : null,
    columns.chosen[row] === null ? soft("This prompt has no pair.") : null,
    element("h4", { textContent: "Prompt" }), ...turns,
    ...(found.reward ? [element("h4", { textContent: "Rankings" }), rankings(found, group, side)] : []),
    element("h4", { textContent: found.reward ? "Responses, by reward" : "Responses" }),
    ...byReward(found).map((at) => response(found, at, side(at))),
  ]));
  scroll.scrollTop = 0;
  head();
  if (focused && focused !== "pair") part(focused)?.focus({ preventScroll: true });
}

function byReward({ responses, reward }) {
  const value = (at) => reward?.[at] ?? -1e308;
  return responses.map((_, at) => at).sort((a, b) => value(b) - value(a) || a - b);
}

function verdict(gold) {
  if (gold === null || gold === undefined) return null;
  const right = CORRECT[gold];
  if (!right) return number(gold);
  return element("span", { className: gold ? "browser-right" : "browser-wrong", textContent: right });
}

// Both rankings as a table: reward and rank by either model.
function rankings(found, group, side) {
  const ranking = (values) => values && { values, ranks: ranks(values, found.ranked || []) };
  const both = [ranking(found.reward), ranking(found.previous)];
  const titles = group.models.flatMap((model, at) => (both[at] ? [[isolated(model), " reward (rank)"]] : []));
  if (found.tokens) titles.push(["tokens"]);
  if (found.gold) titles.push(["label"]);
  const cells = (at) => [
    ...both.flatMap((each) => (each ? [`${number(each.values[at])} (${each.ranks[at] ?? "–"})`] : [])),
    ...(found.tokens ? [String(found.tokens[at] ?? "–")] : []),
  ];
  const line = (at) => element("tr", {},
    element("th", { scope: "row" }, letter(at), " ", badge(side(at))),
    ...cells(at).map((text) => element("td", { className: "number", textContent: text })),
    ...(found.gold ? [element("td", {}, verdict(found.gold[at]))] : []));
  const heads = [["response"], ...titles].map((title) => element("th", { scope: "col" }, ...title));
  return element("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: "Rankings" },
    element("table", {},
      element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...byReward(found).map(line))));
}

const badge = (side) => (side ? element("span", { className: `browser-badge ${side}`, textContent: side }) : null);

function response(found, at, side) {
  const recorded = found.parts?.token_log_ratio?.[at], ratios = Array.isArray(recorded) ? recorded : null;
  const own = Object.entries(found.parts || {}).filter(([, values]) => (values[at] ?? null) !== null);
  const parts = own.filter(([name]) => name !== "token_log_ratio" || !ratios);
  const texts = found.texts.filter(([, each]) => typeof each[at] === "string");
  const more = (title, ...children) => element("details", {}, element("summary", { textContent: title }), ...children);
  return element("div", { className: `browser-response ${side}` },
    element("div", { className: "browser-title" },
      element("b", { textContent: `Response ${letter(at)}` }),
      badge(side),
      verdict(found.gold?.[at]),
      found.finish?.[at] === "length" ? element("span", { textContent: "truncated" }) : null,
      found.reason[at] ? element("span", {}, "no reward: ", isolated(found.reason[at])) : null),
    block(found.responses[at]),
    parts.length ? more("Parts of the reward", pairsOf(parts.map(([name, each]) => [name, numbers(each[at])]))) : null,
    texts.length ? more(`Judge’s texts (${texts.length})`, ...texts.map(([name, all]) => said(name, all[at]))) : null,
    ratios ? more("Log-ratio of each token (nats)", tokens(ratios, found.pieces?.[at])) : null);
}

// Tokens with their log-ratio beneath; without recorded pieces, the numbers alone.
function tokens(ratios, pieces) {
  const token = (ratio, at) => element("span", { className: ratio > 0 ? "up" : "down" },
    isolated(String(pieces?.[at] ?? at + 1)), element("small", { textContent: number(ratio, 2) }));
  return element("div", { className: "browser-tokens", dir: "auto" }, ...ratios.map(token));
}

// Start ----------------------------------------------------------------------------------------------------------

function fill(select, names) {
  select.append(...names.map((name) => element("option", { value: name, textContent: name })));
  select.closest("label").hidden = names.length < 2;
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !index) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const box = root.getBoundingClientRect(), middle = innerHeight / 2;
  const inView = box.top < middle && box.bottom > middle && event.target === document.body;
  if (!inView && !root.contains(event.target)) return;
  const screen = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
  const arrows = { ArrowDown: 1, ArrowUp: -1, PageDown: screen, PageUp: -screen, Home: -Infinity, End: Infinity };
  const steps = { j: 1, k: -1, ...(event.target === list ? arrows : {}) };
  if (event.key in steps) {
    touched = true;
    move(steps[event.key]);
  } else if (event.key === "/") form.q.focus();
  else return;
  event.preventDefault();
}

async function start() {
  const value = await page.data("preferences-index");
  const floats = (column) => Float64Array.from(column, (each) => each ?? NaN);
  for (const name of ["c", "tau", "margin"]) value.rows[name] = floats(value.rows[name]);
  value.sources = [...new Set(value.groups.map((each) => each.source))];
  value.rows.source = value.rows.group.map((at) => value.sources.indexOf(value.groups[at].source));
  value.starts = [0];
  for (const prompts of value.blocks) value.starts.push(value.starts.at(-1) + prompts);
  value.pairs = value.rows.chosen.filter((each) => each !== null).length;
  index = value;
  fill(form.round, index.groups.map((each) => each.title));
  fill(form.task, index.rows.tasks);
  fill(form.source, index.sources);
  for (const name of ["chosen", "rejected"]) {
    form[name].closest("label").hidden = index.rows[`${name}_right`].every((each) => each === null);
  }
  form.shown.closest("label").hidden = !index.rows.chosen.includes(null);
  const { shown, all, skipped } = index.prompts;
  const notes = Object.entries(skipped).map(([why, number]) => `${count(number)} prompts are skipped: ${why}.`);
  const room = `This page has room for ${count(shown)} of ${count(all)} prompts, taken at equal distances.`;
  if (shown < all) notes.unshift(room);
  part("note").textContent = notes.join(" ");
  part("note").hidden = !notes.length;
  part("filters").open = innerWidth > 700;

  const onInput = () => { touched = true; pinned = false; changed(); };
  form.addEventListener("input", onInput);
  form.addEventListener("reset", () => setTimeout(onInput));
  form.q.addEventListener("focus", async () => {  // unpacked while the user types
    for (let at = 0; at < index.blocks.length; at++) await haystack(at);
  }, { once: true });
  form.addEventListener("submit", (event) => event.preventDefault());
  list.addEventListener("scroll", () => requestAnimationFrame(paint), { passive: true });
  list.addEventListener("click", (event) => {
    const row = event.target.closest("[role=option]");
    if (row) { touched = true; select(+row.id.split("-").pop()); }
  });
  new ResizeObserver(paint).observe(list);
  document.addEventListener("keydown", keys);
  addEventListener("hashchange", recall);
  if (!recall()) show();
}

start().catch((error) => {
  part("count").textContent = `The preferences cannot be read: ${error.message}`;
  throw error;
});
