"""The unified transformer: blocks, streams with weights of their own that attend as one sequence, scan over layers."""

from jaxmm.transformer.config import REMAT_POLICIES, TransformerConfig
from jaxmm.transformer.sampling import TokenSampler
from jaxmm.transformer.stack import Transformer, llama_rows

__all__ = ["REMAT_POLICIES", "TokenSampler", "Transformer", "TransformerConfig", "llama_rows"]
