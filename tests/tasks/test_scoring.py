"""Rows that go through a model in batches come back in their own order."""

from hypothesis import given
from hypothesis import strategies as st

from scalora.tasks.scoring import batches, by_row, consecutive


@given(lengths=st.lists(st.integers(1, 9), max_size=30), batch_size=st.integers(1, 5), alike=st.booleans())
def test_every_row_is_worked_on_once_and_comes_back_in_its_place(lengths, batch_size, alike):
    parts = consecutive(len(lengths), batch_size) if alike else list(batches(lengths, lengths, batch_size))
    told, seen = [], []

    def work(batch):
        assert 0 < len(batch) <= batch_size
        seen.extend(batch)
        return [lengths[row] for row in batch]

    assert by_row(parts, work, lambda done, total: told.append((done, total))) == lengths
    assert sorted(seen) == list(range(len(lengths)))
    assert [done for done, _ in told] == [sum(map(len, parts[: i + 1])) for i in range(len(parts))]
    assert {total for _, total in told} <= {len(lengths)}
