"""Several trained networks made one: on the line between them, matched, repaired, or by a chain."""

from syncnorm.merge.chain import chain_of_merges
from syncnorm.merge.interpolate import interpolate
from syncnorm.merge.match import match_weights
from syncnorm.merge.repair import repair

__all__ = ["chain_of_merges", "interpolate", "match_weights", "repair"]
