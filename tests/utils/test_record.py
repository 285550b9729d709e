from utils.record import Record


def test_a_state_of_an_older_version_is_read():
    """A number that came later keeps its default."""
    state = Record.empty(2, 4).state_dict() | {"done": 1}
    del state["drift"]
    record = Record.empty(2, 4)
    record.load_state_dict(state)
    assert record.done == 1 and record.drift == []
