#!/usr/bin/env bash
# pytest 9.2.0 with pytest-xdist 3.8.0: --dist loadgroup takes no notice of xdist_group marks. Tests of one group run on
# several workers, each test or file by itself, and nothing says so. xdist writes the group's name to the end of a
# test's _nodeid in the worker and reads it from the node id in the scheduler; since pytest 9.2 the node id is made of
# another attribute. With pytest 9.0.2 the same tests stay together.
#
# Seen: of twelve tests of one group on two workers, both ran some with 9.2.0; one ran all with 9.0.2.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cat > test_group.py <<'PYTHON'
import os, time, pytest

@pytest.mark.parametrize("number", range(12))
@pytest.mark.xdist_group("together")
def test_one_of_a_group(number):
    time.sleep(0.2)
    open(os.environ["SEEN"], "a").write(os.environ["PYTEST_XDIST_WORKER"] + "\n")
PYTHON
workers() {  # how many workers ran tests of the group
    packages "pytest==$1" pytest-xdist==3.8.0
    SEEN="$folder/seen.$1" "$python" -m pytest -q -n 2 --dist loadgroup test_group.py > "output.$1"
    [[ $(wc -l < "seen.$1") == 12 ]] || { echo "not all tests ran with pytest $1"; exit 1; }
    count=$(sort -u "seen.$1" | wc -l)
    rm -rf environment
}
workers 9.0.2; before=$count
workers 9.2.0; now=$count
echo "pytest-xdist 3.8.0, one group of twelve tests: $before worker with pytest 9.0.2, $now with pytest 9.2.0"
[[ $before == 1 ]] || { echo "groups are not kept together with pytest 9.0.2 either"; exit 1; }
[[ $now == 2 ]] || { echo "groups are kept together with pytest 9.2.0"; exit 1; }
