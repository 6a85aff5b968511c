"""How a stage ends: what a user can mend is one message and exit code 2, all else keeps its traceback."""

import pytest
import torch

from cream import console
from cream.errors import UserError


def ends(error):
    @console.stage
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as ended:
        main([])
    return ended.value.code


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("a.json: no such file"), 2, "error: a.json: no such file\n"),
        (OSError(28, "No space left on device", "a.json"), 2, "error: a.json: No space left on device\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"), 2, "no memory left: CUDA out"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "no memory left"),
        (KeyboardInterrupt(), 130, "goes on from here"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(capsys, error, code, said):
    assert ends(error) == code
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1 and "Traceback" not in printed


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError("no file of the user's"), KeyError("x")])
def test_a_bug_keeps_its_traceback(error):
    @console.stage
    def main(argv):
        raise error

    with pytest.raises(type(error)):
        main([])
