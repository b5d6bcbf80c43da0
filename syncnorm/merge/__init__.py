"""Several trained networks made one: on the line between them, matched, repaired, or by a chain."""

from syncnorm.merge.interpolate import interpolate
from syncnorm.merge.match import match_weights

__all__ = ["interpolate", "match_weights"]
