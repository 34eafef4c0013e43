"""The rule itself."""

from jaxtyping import Array, Bool, Int

from jaxmm.sequence import Intervals


def visible(places: Int[Array, "B Lq"], intervals: Intervals) -> Bool[Array, "B Lq Lk"]:
    """Which key each query may see. For the dense path and for tests: nothing else builds an array of Lq x Lk."""
    place = places[:, :, None]
    return (intervals.start[:, None, :] <= place) & (place < intervals.end[:, None, :])
