from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import Metric

from loramux_server.metrics.adapter_counters import AdapterCounters, label_of


def generated(counters: AdapterCounters) -> dict[str, float]:
    """Generated tokens by label value."""
    families: dict[str, Metric] = {family.name: family for family in counters.collect()}
    return {sample.labels["adapter"]: sample.value for sample in families["loramux_generated_tokens"].samples}


def serve(counters: AdapterCounters, name: str, tokens: int) -> None:
    counters.claim(name)
    counters.count_tokens(name, 0, tokens)


def test_the_first_names_have_labels_and_the_rest_count_as_other() -> None:
    counters = AdapterCounters(2)
    for name in ("a", "b", "c", "d"):
        serve(counters, name, 10)
    counters.count_tokens(None, 0, 7)
    assert generated(counters) == {"base": 7, "other": 20, "a": 10, "b": 10}


def test_a_retired_name_keeps_its_series_until_its_place_is_needed() -> None:
    counters = AdapterCounters(2)
    serve(counters, "a", 10)
    serve(counters, "b", 20)
    counters.retire("a")
    assert generated(counters)["a"] == 10
    serve(counters, "c", 1)
    assert generated(counters) == {"base": 0, "other": 10, "b": 20, "c": 1}


def test_a_name_that_returns_goes_on_where_it_was() -> None:
    counters = AdapterCounters(1)
    serve(counters, "a", 10)
    counters.retire("a")
    serve(counters, "a", 5)
    serve(counters, "b", 1)
    assert generated(counters) == {"base": 0, "other": 1, "a": 15}


def test_a_request_that_outlives_its_deleted_adapter_takes_no_label() -> None:
    counters = AdapterCounters(1)
    serve(counters, "a", 10)
    counters.retire("a")
    counters.count_tokens("a", 0, 1)
    serve(counters, "b", 1)
    counters.count_tokens("a", 0, 2)
    assert generated(counters) == {"base": 0, "other": 13, "b": 1}


def test_names_that_are_not_registered_any_more_are_retired() -> None:
    counters = AdapterCounters(1)
    serve(counters, "a", 10)
    counters.retire_all_but({"b"})
    serve(counters, "b", 1)
    assert generated(counters) == {"base": 0, "other": 10, "b": 1}


def test_adapters_named_like_a_reserved_label_do_not_collide_with_it() -> None:
    counters = AdapterCounters(9)
    for name in ("base", "other", "unknown"):
        serve(counters, name, 1)
    counters.count_tokens(None, 0, 5)
    assert generated(counters) == {"base": 5, "other": 0, "adapter:base": 1, "adapter:other": 1, "adapter:unknown": 1}
    assert label_of("others") == "others"


def test_no_label_at_all_is_possible() -> None:
    counters = AdapterCounters(0)
    serve(counters, "a", 3)
    assert generated(counters) == {"base": 0, "other": 3}


@given(
    st.lists(st.tuples(st.sampled_from(["claim", "tokens", "retire", "prune"]), st.sampled_from("abcdef")), max_size=80)
)
def test_the_sum_over_adapters_never_goes_back_and_labels_stay_bounded(events: list[tuple[str, str]]) -> None:
    counters = AdapterCounters(2)
    total = 0
    for event, name in events:
        if event == "claim":
            counters.claim(name)
        elif event == "tokens":
            counters.count_tokens(name, 0, 3)
            total += 3
        elif event == "retire":
            counters.retire(name)
        else:
            counters.retire_all_but({name})
        now = generated(counters)
        assert sum(now.values()) == total
        assert len(now) <= 2 + 2


def test_sums_of_adapters_have_one_label_whatever_they_are_made_of() -> None:
    counters = AdapterCounters(1)
    for name in ("a+b", "b+c", "composed"):
        counters.claim(name)
        counters.count_tokens(name, 1, 2)
    assert generated(counters) == {"base": 0, "other": 0, "composed": 4, "adapter:composed": 2}
