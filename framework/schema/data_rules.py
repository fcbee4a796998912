"""Rules about where the training data comes from."""

from __future__ import annotations

from collections.abc import Iterator

from framework.schema.findings import Finding, Judged


def check_data(judged: Judged) -> Iterator[Finding]:
    """One way to name the data, and weights for all of its sources or for none."""
    data = judged.config.data
    if data.path is not None and data.sources:
        yield judged.finding(
            "data.sources",
            f'data.path ("{data.path}") and data.sources can\'t both be given',
            hint="Make the path one of the sources: data.path=null data.sources=[{path: ...}, ...].",
            reads=("data.path",),
            allowed="one of data.path and data.sources",
        )
    if data.path is None and not data.sources:
        yield judged.finding(
            "data.path",
            "neither data.path nor data.sources is given",
            hint="Set it in the recipe or on the command line, for instance data.path=data/pictures.",
            reads=("data.sources",),
            allowed="a path, or data.sources",
        )
    if data.sources and data.base_dir is not None:
        yield judged.finding(
            "data.base_dir",
            "each of data.sources has a base_dir of its own, so this one is read by none",
            hint="Write it into the sources: data.sources=[{path: ..., base_dir: ...}].",
            code="unused",
            reads=("data.sources",),
        )
    weights = [source.weight for source in data.sources]
    if None in weights and any(weight is not None for weight in weights):
        bare = weights.index(None)
        yield judged.finding(
            f"data.sources[{bare}].weight",
            "some sources have a weight and this one has none, so its share isn't known",
            hint="Give every source a weight, or none (then they count by their number of pictures and repeats).",
            reads=("data.sources",),
            allowed="a weight for every source, or for none",
        )
