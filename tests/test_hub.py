"""Groups, without a loop."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wsgateway.hub import Hub

NAMES = ("all", "a_1", "a_2_b", "b_1")
steps = st.lists(st.tuples(st.booleans(), st.sampled_from(NAMES), st.integers(0, 3)))


@given(steps)
def test_the_hub_is_a_set_per_group_and_reports_first_and_last(
    steps: list[tuple[bool, str, int]],
) -> None:
    hub: Hub[int] = Hub()
    model: dict[str, set[int]] = {name: set() for name in NAMES}
    for joins, group, member in steps:
        before = len(model[group])
        if joins:
            model[group].add(member)
            assert hub.join(group, member) == (before == 0)
        else:
            model[group].discard(member)
            assert hub.leave(group, member) == (before == 1 and not model[group])
        for name, members in model.items():
            assert set(hub.members(name)) == members
        assert set(hub.groups()) == {name for name, members in model.items() if members}
        assert len(hub) == sum(map(bool, model.values()))
        for kind in ("all", "a", "b", "c"):
            named = sum(name.split("_")[0] == kind for name in hub.groups())
            assert hub.count(kind) == named
