"""Named judge prompts: what a judge is asked, how its verdict is found in its text, and which scores are valid.

The criteria are those of the papers, the words are ours. The rubric and the question come before the response, so that
an engine with prefix caching computes them once for all responses to a prompt.
"""

from typing import NamedTuple


class JudgePrompt(NamedTuple):
    """template: Jinja, of the turn to the judge; its variables are `prompt` and `response`, or `response_a` and
    `response_b` of a pairwise judge. One without variables is a turn after the response, which is then the
    assistant's. parse: the text around the score, {{ reward }}. valid: as --valid_reward."""

    template: str
    parse: str
    valid: str | None = None


CRITERIA = """\
Judge how well a response serves the user who asked for it. Start from 0 points, and add one for each of these \
statements that is true of it:

1. It is relevant and gives some information on what was asked, even if that is incomplete or partly beside the point.
2. It deals with a substantial part of the question, although it may not resolve it fully, or not directly.
3. It answers the basic elements of the question in a useful way, whether it reads like the text of an AI assistant or \
like a blog or a search result.
4. It is clearly written as an AI assistant would, answers the question directly and completely, and is well organised \
and helpful; there may be slight room for improvement in clarity, brevity or focus.
5. It is made for this very question, without anything superfluous, shows expert knowledge, and is engaging and \
insightful.
"""
QUOTED = """
<question>
{{ prompt }}
</question>

<response>
{{ response }}
</response>
"""
POINTS = """
Give your reasons briefly, in at most 100 words. Then end with one line that has the sum of the points, from 0 to 5, \
in this form:
Score: <points>"""
WEB = (
    "\nAssess it from the perspective of an AI assistant, with what a search of the web would tell where that helps.\n"
)

RATING = (
    """\
Rate a response to a user's question on a scale from 1 (useless) to 10 (could not be better). Be impartial. Consider \
whether it is helpful, relevant and correct, how deep it goes, how original it is, and whether it has the right level \
of detail.
"""
    + QUOTED
    + """
First give your reasons briefly, in at most 100 words. Then end with one line that has the rating, in this form:
Rating: <number from 1 to 10>"""
)

PAIRWISE = """\
Compare two responses to the same question of a user, and choose the one that serves the user better. Consider whether \
they follow the user's instructions, are helpful, relevant and correct, how deep they go, and whether they have the \
right level of detail. Be impartial: neither their order nor their length should decide.

<question>
{{ prompt }}
</question>

<response_a>
{{ response_a }}
</response_a>

<response_b>
{{ response_b }}
</response_b>

First compare them briefly, in at most 100 words. Then end with one line that has the letter of the better response, \
in this form:
Choice: <letter>"""

JUDGE_PROMPTS = {
    # Self-Rewarding Language Models (arXiv 2401.10020, figure 2): five criteria, a point for each
    "additive": JudgePrompt(CRITERIA + QUOTED + POINTS, "Score: {{ reward }}", "0:5"),
    # the same with the paper's remark on knowledge from the web, as in the code that CREAM released: its P-SRLM
    "cream": JudgePrompt(CRITERIA + WEB + QUOTED + POINTS, "Score: {{ reward }}", "0:5"),
    # MT-bench (arXiv 2306.05685, figure 6): one rating
    "rating": JudgePrompt(RATING, "Rating: {{ reward }}", "1:10"),
    # the same paper, figure 5: the better of two, asked in both orders
    "pairwise": JudgePrompt(PAIRWISE, "Choice: {{ reward }}"),
    # no rubric: the question after the response that the tiny world's judges are trained on
    "plain": JudgePrompt("Score?", "{{ reward }}", "0:5"),
}
