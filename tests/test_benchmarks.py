"""The benchmarks: that both sides do the same work, what is counted, and that each runs and prints its ratios."""

import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import measure  # noqa: E402
import peers  # noqa: E402
import workload  # noqa: E402

from cream.errors import UserError  # noqa: E402
from cream.model import trees  # noqa: E402
from cream.model.hardware import Budget  # noqa: E402
from cream.model.load import load_policy
from cream.model.logprobs import LogProbs, score  # noqa: E402
from cream.text.chat import Tokens  # noqa: E402
from cream.training.stages import bradley_terry, dpo  # noqa: E402

WORDS = 300
PROMPT, ANSWERS = [7, 8, 9], ([4, 2], [5, 6, 2])
GROUP = [Tokens(PROMPT + answer, [(3, 3 + len(answer))]) for answer in ANSWERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny shape with random weights."""
    return workload.save_model(tmp_path_factory.mktemp("llama"), workload.SHAPES["tiny"], WORDS, seed=0)


# Counting -------------------------------------------------------------------------------------------------------------


def test_trees_count_a_prompt_once_and_the_head_on_answers_only():
    # prompt 3 tokens: 1 + 2 + 3 pairs; answers of 2 and 3 tokens see it whole, and 1 + 2 and 1 + 2 + 3 of themselves
    assert measure.trees([GROUP]) == measure.Layout(tokens=8, head=5, pairs=6 + (6 + 3) + (9 + 6))


def test_peers_are_counted_with_their_padding():
    assert peers.released_layout([GROUP]) == measure.Layout(tokens=12, head=12, pairs=2 * 21)
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    assert measure.documents(packed) == measure.Layout(tokens=5, head=5, pairs=6 + 3)


def test_operations_of_a_layout_by_hand():
    shape = workload.Shape(hidden=4, layers=2, heads=1, inner=8)
    layout = measure.Layout(tokens=3, head=2, pairs=6)
    layers, head = 2 * (3 * 2 * (4 * 16 + 3 * 4 * 8) + 6 * 2 * 2 * 4), 2 * 2 * 4 * 10
    assert layout.operations(shape, words=10) == layers + head
    assert layout.operations(shape, words=10, passes=3, head=4) == 3 * layers + 4 * head


def test_operations_are_those_that_torch_counts(folder):
    from torch.utils.flop_counter import FlopCounterMode

    shape, model = workload.SHAPES["tiny"], load_policy(folder, torch.float32, torch.device("cpu"))
    model.set_attn_implementation("eager")  # which multiplies the whole square
    rows, width = 2, 12
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(rows, width, dtype=torch.int64), use_cache=False)
    square = measure.Layout(rows * width, rows * width, rows * width**2)
    assert square.operations(shape, WORDS) == pytest.approx(counter.get_total_flops(), rel=1e-3)


# The work of the two sides --------------------------------------------------------------------------------------------


def test_the_released_procedure_and_trees_give_the_same_scores(folder):
    groups = workload.groups(workload.lengths("20/12", 5, 3, 0.5, seed=0), WORDS, seed=0)
    plain, policy = (load_policy(folder, torch.float32, torch.device("cpu")) for _ in range(2))
    batches = peers.released_batches(groups)
    assert [len(batch) for batch in batches] == [6, 6, 3]
    scored = {}
    for batch in batches:
        values = peers.released_score(plain, [batch]).tolist()
        scored |= {tuple(row.ids): value for row, value in zip(batch, values, strict=True)}
    ours = score(LogProbs(policy), groups, Budget(200))
    assert ours == [pytest.approx([scored[tuple(row.ids)] for row in group], abs=1e-3) for group in groups]


def test_trl_reads_the_very_tokens():
    tokenizer = peers.number_tokenizer(WORDS)
    groups = workload.groups([(20, [9, 5])], WORDS, seed=1)
    (row,) = peers.preference_rows([tuple(groups[0])])
    for which, tokens in zip(("chosen", "rejected"), groups[0], strict=True):
        assert tokenizer(row["prompt"] + row[which]).input_ids == tokens.ids


@pytest.mark.slow
def test_an_epoch_of_each_dpo_side_runs_on_the_same_pairs(folder):
    from dpo_step import Ours

    pairs = [tuple(group) for group in workload.groups(workload.lengths("20/12", 8, 2, 0.5, seed=0), WORDS, seed=0)]
    rows, common = peers.preference_rows(pairs), {"max_length": 64, "bf16": False}
    alone = peers.TRL(folder, WORDS, "cpu", rows, "DPO", **peers.DPO_BEST | common)
    assert alone() > 0
    each = (peers.rectangle(2, max(map(len, pair))) for pair in pairs)
    assert alone.layout == sum(each, measure.Layout())
    together = peers.TRL(folder, WORDS, "cpu", rows, "DPO", **common)
    assert together() > 0
    assert together.layout == peers.rectangle(16, max(len(row) for pair in pairs for row in pair))
    examples = [dpo.Example(*pair, 1.0, (0.0, 0.0)) for pair in pairs]
    ours = Ours(folder, dpo.Stage(dpo.Options(), {}), examples, 8, False, "cpu", None)
    before = [p.clone() for p in ours.model.parameters()]
    assert ours() > 0
    assert all(map(torch.equal, before, ours.model.parameters()))  # so that every round does the same work


@pytest.mark.slow
def test_an_epoch_of_each_reward_side_runs_on_the_same_pairs(folder):
    from dpo_step import Ours
    from reward_step import trl_settings

    pairs = [tuple(group) for group in workload.groups(workload.lengths("20/12", 8, 2, 0.5, seed=0), WORDS, seed=0)]
    sides = {n: peers.TRL(folder, WORDS, "cpu", peers.reward_rows(pairs), "Reward", **trl_settings(n)) for n in (1, 8)}
    for step in sides.values():
        step.settings["bf16"] = False
        assert step() > 0
    longest = [max(map(len, pair)) for pair in pairs]
    assert sides[1].layout == sum((peers.rectangle(2, width, 2) for width in longest), measure.Layout())
    assert sides[8].layout == peers.rectangle(16, max(longest), 16)
    stage = bradley_terry.Stage(bradley_terry.Options(), {})
    ours = Ours(folder, stage, [bradley_terry.Example(*pair) for pair in pairs], 8, False, "cpu", None)
    assert ours() > 0 and measure.trees(pairs, once=True).head == 16


PAIRS = {  # prompt, chosen, rejected: tokens, and whether trl trains on all of them at max_length 30
    "that fit to the last token": ([(20, [9, 10]), (5, [25, 4])], True),
    "a response longer": ([(20, [9, 5]), (20, [9, 14])], False),
    "a prompt longer": ([(20, [9, 5]), (40, [9, 5])], False),
    "a prompt as long": ([(20, [9, 5]), (30, [9, 5])], False),
}


@pytest.mark.slow
@pytest.mark.parametrize("which", PAIRS)
def test_pairs_that_trl_drops_or_cuts_are_no_comparison(folder, which):
    lengths, whole = PAIRS[which]
    rows = peers.preference_rows([tuple(group) for group in workload.groups(lengths, WORDS, seed=0)])
    step = peers.TRL(folder, WORDS, "cpu", rows, "DPO", **peers.DPO_BEST, max_length=30, bf16=False)
    if whole:
        assert step() > 0
        return
    with pytest.raises(UserError, match=r"trl trained on \d+ of \d+ response tokens.*max_length, here 30"):
        step()


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("longest", [29, 40])
def test_conversations_that_trl_cuts_are_no_comparison(folder, longest, packing):
    made = [group[0] for group in workload.groups([(9, [20]), (10, [longest - 10])], WORDS, seed=0)]
    settings = peers.SFT_BEST | {"max_length": 30, "bf16": False, "packing": packing}
    step = peers.TRL(folder, WORDS, "cpu", peers.conversation_rows(made), "SFT", **settings)
    if longest <= 30:
        assert step() > 0
        return
    with pytest.raises(UserError, match="trl trained on 40 of 50 response tokens"):
        step()


def test_packed_conversations_do_not_see_each_other_in_the_peer(folder):
    model = load_policy(folder, torch.float32, torch.device("cpu"))
    first, second = torch.randint(3, WORDS, (2, 1, 9), generator=torch.Generator().manual_seed(0))
    packed, positions = torch.cat([first, second], 1), torch.arange(9).repeat(2)[None]
    with torch.no_grad():
        together = model(packed, position_ids=positions, use_cache=False).logits[:, 9:]
        torch.testing.assert_close(together, model(second, use_cache=False).logits, atol=1e-5, rtol=0)


def test_signs_of_random_steps(folder):
    """All sides of prm_score give the same odds, from what they are counted to lay out."""
    import prm_score

    made = workload.groups(workload.lengths("20/24", 2, 3, 0.2, seed=0), WORDS, seed=0)
    made = [[prm_score.signed(row, 4) for row in group] for group in made]
    rows = [row for group in made for row in group]
    assert all(len(row.spans) == 4 and row.spans[-1][1] == len(row) and row.spans[0][0] >= 15 for row in rows)
    policy = load_policy(folder, torch.float32, torch.device("cpu"))
    found = {
        "steps": prm_score.step_by_step(policy, rows, False),
        "padded": prm_score.in_padded_rows(policy, rows, True),
    }
    model = prm_score.SignOdds(policy, prm_score.SIGNS)
    found["tree"] = [v for group in prm_score.sign_odds(model, made, Budget(500)) for row in group for v in row]
    prm_score.check(found, 1e-4)
    counted = prm_score.layouts(made, False)
    assert counted["tree"].tokens == sum(trees.tree_shape(group)[0] for group in made)
    assert counted["steps"].tokens == sum(start for row in rows for start, _ in row.spans)


# Lengths --------------------------------------------------------------------------------------------------------------


def test_given_lengths_are_drawn_within_the_spread_and_by_the_seed():
    drawn = workload.lengths("100/50", 50, 5, 0.2, seed=0)
    prompts, answers = [p for p, _ in drawn], [a for _, found in drawn for a in found]
    assert min(prompts) >= 80 and max(prompts) <= 120 and min(answers) >= 40 and max(answers) <= 60
    assert len(set(prompts)) > 1 and len(answers) == 250
    assert drawn == workload.lengths("100/50", 50, 5, 0.2, seed=0) != workload.lengths("100/50", 50, 5, 0.2, seed=1)
    assert workload.lengths("100/50", 2, 2, 0.0, seed=0) == [(100, [50, 50])] * 2


def test_real_conversations_are_trained_on_every_answer(shared):
    args = Namespace(seed=0, spread=0.2)
    rows = workload.conversations("oasst", 6, 512, WORDS, args)
    assert all(20 < len(row) <= 512 and max(row.ids) < WORDS for row in rows)
    assert any(len(row.spans) > 1 for row in rows) and all(row.num_response_tokens < len(row) for row in rows)


@pytest.mark.parametrize("work", ["oasst", "gsm8k"])
def test_real_lengths(work, shared):
    for prompt, answers in workload.lengths(work, 40, 5, 0.2, seed=0):
        assert prompt > 5 and len(answers) == 5 and min(answers) > 1


def test_real_lengths_without_their_data_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(workload, "SHARED", tmp_path / "none")
    with pytest.raises(UserError, match="--prompt_len"):
        workload.lengths("oasst", 1, 5, 0.2, seed=0)
    with pytest.raises(UserError, match="600/250"):
        workload.lengths("webtext", 1, 5, 0.2, seed=0)


# Each command ---------------------------------------------------------------------------------------------------------

TINY = "--shape tiny --words 300 --rounds 1 --sizes 4"
COMMANDS = {
    "score.py --work 20/10,30/5": ["score_20_10", "score_20_10_of_ceiling", "score_30_5", "score_30_5_of_ceiling"],
    "dpo_step.py --work 20/10": [
        f"dpo_20_10_vs_trl_{peer}{of}" for peer in ("default", "best") for of in ("", "_of_ceiling")
    ],
    "sft_step.py --prompt_len 20 --answer_len 10": ["sft_20_10_vs_trl_best", "sft_20_10_vs_trl_best_of_ceiling"],
    "reward_score.py --work 20/10 --answers 4": [
        f"reward_score_20_10{of}" for of in ("", "_of_ceiling", "_of_matrix_rate")
    ],
    "rloo_step.py --work 20/10": [f"rloo_20_10_vs_trl_best{of}" for of in ("", "_of_ceiling")],
    "iteration.py --work 20/10": ["iteration_20_10", "iteration_20_10_of_ceiling"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_runs_and_ends_with_its_ratios(command, stages, repo):
    check_ratios(_run(stages, repo, f"{command} {TINY}"), COMMANDS[command])


@pytest.mark.slow
def test_the_gpu_script_runs_its_parts_on_one_model(stages, repo):
    out = _run(stages, repo, "gpu.py --device cpu --shape tiny --words 300 --rounds 1 --scale 0.01 --parts score.py")
    assert re.search(r"trees: \d+\.\d responses/s, \d+ tokens/s", out) and "ratio score_600_250 " in out


@pytest.mark.slow
def test_memory_is_measured_in_a_process_per_side(stages, repo, monkeypatch, capsys):
    """Forks here."""
    import memory

    monkeypatch.setattr(sys, "argv", ["memory.py", *f"--work 20/10 {TINY}".split()])
    monkeypatch.setattr(memory.subprocess, "run", lambda argv, **_: Namespace(stdout=stages.run(repo, argv[1:]).out))
    memory.main()
    peers = "vs_trl_default", "vs_trl_best"
    names = [f"memory_{what}_{peer}" for what in ("dpo", "dpo_adamw_bf16") for peer in peers]
    check_ratios(capsys.readouterr().out, names)


def check_ratios(out: str, names: list[str]) -> None:
    """The last lines give a ratio for each name."""
    found = [re.fullmatch(r"ratio (\w+) (\d+\.\d+)", line) for line in out.splitlines()[-len(names) :]]
    assert all(found), out
    assert [match[1] for match in found] == names
    assert all(float(match[2]) > 0 for match in found)


@pytest.mark.slow
def test_evaluation_is_measured_beside_the_harness(shared, stages, repo):
    """And both sides give the same."""
    command = "evaluation.py --shape tiny --rounds 1 --items 4 --batch_sizes 4 --tasks siqa,gsm8k --gen_max_tokens 4"
    out = _run(stages, repo, command)
    assert re.findall(r"^ratio (\w+) \d+\.\d+$", out, re.MULTILINE) == ["evaluation_siqa", "evaluation_gsm8k"]
    assert float(re.search(r"log-likelihoods of 12 options differ by (\S+) nats", out)[1]) < 1e-3
    assert "4 of 4 texts are equal" in out


@pytest.mark.slow
def test_judging_is_measured_beside_padded_rows(stages, repo):
    """Which give the same expected scores, or it ends in an error."""
    command = "judge.py --parts trees --shape tiny --words 400 --rounds 1 --prompts 3 --rubric 90 --answer_len 20"
    out = _run(stages, repo, command)
    names = re.findall(r"^ratio (\w+) \d+\.\d+$", out, re.MULTILINE)
    assert names == ["judge_trees_vs_padded", "judge_trees_vs_padded_of_ceiling"]


@pytest.mark.slow
def test_comparing_is_measured_beside_padded_prompts(stages, repo):
    """Which give the same probabilities, or it ends in an error."""
    sizes = "--prompts 1 --answers 3 --prompt_len 70 --answer_len 40"
    out = _run(stages, repo, f"pairwise_score.py --shape tiny --words 400 --rounds 1 {sizes}")
    assert "6 ordered pairs" in out
    assert re.findall(r"^ratio (\w+) \d+\.\d+$", out, re.MULTILINE) == [
        "pairwise_trees_vs_padded", "pairwise_trees_vs_padded_of_ceiling",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_harness_agrees(shared, stages, repo):
    """Every task's first items, by each measure."""
    out = _run(stages, repo, "harness.py --limit 6 --gen_max_tokens 8")
    assert re.search(r"^disagreements gsm8k_rules \d+ of 1280$", out, re.MULTILINE)
    counts = re.findall(r"^disagreements (\w+) (\d+) of 6$", out, re.MULTILINE)
    assert len(counts) == 2 * 4 + 3 and {count for _, count in counts} == {"0"}, out


def test_a_disagreement_has_its_reason():
    import harness

    from cream.records import Answer

    answer = {
        "question": "Which?\nA. x\nB. yy",
        "label": "A",
        "responses": "x",
        "final_prediction": "a",
        "correct": True,
    }
    record = Answer(uuid="q", option_logprob={"A": -1.0, "B": -1.00001}, option_tokens={"A": 1, "B": 1}, **answer)
    assert harness.peers_pick(record, [-1.0, -1.5], "none") == "a"
    assert harness.peers_pick(record, [-1.0, -1.5], "chars") == "b"
    assert harness.reason(record, [-1.0, -1.0]).startswith("rounding: log-likelihoods differ by 1e-05")
    assert harness.reason(record, [-1.0, -1.5]).startswith("NOT EXPLAINED")
    without = Answer(uuid="q", extra={"reason": "longer"}, **answer)
    assert harness.reason(without, [-1.0, -1.5]) == "longer; the peer scores it all the same"


def _run(stages, repo, command: str) -> str:
    """What a benchmark prints."""
    done = stages.run(repo, shlex.split(f"benchmarks/{command}"))
    assert done.code == 0, done.err
    return done.out


def test_memory_in_shards_is_what_deepspeed_estimates():
    import scaling
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    for n, gpus, nodes in ((8.0, 1, 1), (8.0, 8, 1), (70.0, 8, 8)):
        for offload in (False, True):
            name = ", offload" * offload
            found = [scaling.MODES[f"ZeRO-{stage}{name}"](n, gpus * nodes)[0] for stage in (2, 3)]
            two = zero2(n * 1e9, gpus, nodes, cpu_offload=offload)[1]
            three = zero3(n * 1e9, 1e9, gpus, nodes, cpu_offload=offload, cpu_offload_params=offload)[1]
            assert found == pytest.approx([two / 1e9, three / 1e9], rel=1e-6)


@pytest.mark.slow
def test_a_mistake_ends_in_one_message(stages, repo):
    done = stages.run(repo, ["benchmarks/score.py", *TINY.split(), "--work", "none"])
    assert done.code == 2 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("error: --work none")
