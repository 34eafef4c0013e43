"""The keys of the reference checkpoint (specification section 3): there is no official one.

The backbone's keys are those of Hugging Face's Llama, the VAE's those of diffusers below `vae.`.
"""

from jaxmm.autoencoders import weights_table as vae_table
from jaxmm.layers.parameters import Blueprint, subset
from jaxmm.models.transfusion.config import TransfusionConfig
from jaxmm.transformer import llama_rows
from jaxmm.weights import LINEAR, SAME, Row, Table


def weights_table(config: TransfusionConfig, blueprint: Blueprint) -> Table:
    """The table of one config."""
    rows = [Row("model.embed_tokens.weight", "embed.table")]
    rows += [Row(row.official, "transformer." + row.ours, row.transform) for row in llama_rows()]
    if not config.tie_embeddings:
        rows.append(Row("lm_head.weight", "head.kernel", LINEAR))
    rows += _linear("time_embed.mlp.0", "time.input") + _linear("time_embed.mlp.2", "time.output")
    for name in ("patch_encoder.proj", "patch_decoder.proj"):
        rows += _linear(name, name)
    time = _linear("patch_encoder.time_proj", "patch_encoder.time_proj")
    if config.time_injection == "post_linear":
        time = [Row(row.official, None) for row in time]
    rows += time
    if config.codec is not None:
        rows += [row.prefixed("vae.", "codec.") for row in vae_table(subset(blueprint.parameters, "codec.")).rows]
    return Table(rows, blueprint.parameters)


def _linear(official: str, ours: str) -> list[Row]:
    return [Row(f"{official}.weight", f"{ours}.kernel", LINEAR), Row(f"{official}.bias", f"{ours}.bias", SAME)]
