"""The list of planted faults: each can still be planted, and names tests that exist."""

from benchmarks.planted import ROOT, faults


def test_each_fault_changes_the_one_place_where_its_text_stands() -> None:
    for fault in faults():
        assert (ROOT / fault.file).read_text().count(fault.old) == 1, fault
        assert fault.new != fault.old
        assert all((ROOT / file).is_file() for file in fault.tests), fault
