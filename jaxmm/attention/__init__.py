"""Attention under the interval mask: query i may see key j if start[j] <= place[i] < end[j].

That rule stands here and nowhere else. `attend` is the contract, whatever computes it; `KVCache` keeps keys for
decoding.
"""

from jaxmm.attention.attend import attend
from jaxmm.attention.cache import KVCache
from jaxmm.attention.mask import visible

__all__ = ["KVCache", "attend", "visible"]
