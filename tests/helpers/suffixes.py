"""The content of a suffix tree, for comparison."""

from specdec.proposers.suffix_tree import Node, SuffixTree


def spelt_out(tree: SuffixTree) -> dict[tuple[int, ...], tuple]:
    """What every run has in the tree: counts, and positions counted from the first token that is not forgotten."""
    first = tree._start + tree._num_forgotten
    found, waiting = {}, [((), tree._root)]
    while waiting:
        run, place = waiting.pop()
        if isinstance(place, Node):
            waiting += [((*run, token), child) for token, child in place.children.items()]
            found[run] = (place.count, place.total, place.last - first, tree.likeliest(place, ()))
        else:
            found[run] = (1, place - first)
    del found[()]  # the root ends nowhere
    return found
