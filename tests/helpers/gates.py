"""The gates of the conformance kit, under the name that the tests use."""

from specdec.conformance.gates import ALPHA, distance, marginal, passes, radius

__all__ = ["ALPHA", "distance", "marginal", "passes", "radius"]
