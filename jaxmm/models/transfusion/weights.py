"""The keys of the reference checkpoint (specification section 3): there is no official one.

The backbone's keys are those of Hugging Face's Llama, the VAE's those of diffusers below `vae.`.
"""

from jaxmm.autoencoders import weights_table as vae_table
from jaxmm.layers.parameters import Blueprint, subset
from jaxmm.models.transfusion.config import TransfusionConfig
from jaxmm.transformer import llama_rows
from jaxmm.weights import CONV, LINEAR, SAME, Row, Table


def weights_table(config: TransfusionConfig, blueprint: Blueprint) -> Table:
    """The table of one config."""
    rows = [Row("model.embed_tokens.weight", "embed.table")]
    rows += [Row(row.official, "transformer." + row.ours, row.transform) for row in llama_rows()]
    if not config.tie_embeddings:
        rows.append(Row("lm_head.weight", "head.kernel", LINEAR))
    rows += _linear("time_embed.mlp.0", "time.input") + _linear("time_embed.mlp.2", "time.output")
    rows += _unet_rows() if config.patch_codec == "unet" else _linear_codec_rows(config)
    if config.grid_positions == "learned":
        rows.append(Row("patch_encoder.grid_positions", "grid_positions.table"))  # the reference has none
    if config.codec is not None:
        rows += [row.prefixed("vae.", "codec.") for row in vae_table(subset(blueprint.parameters, "codec.")).rows]
    return Table(rows, blueprint.parameters)


def _linear_codec_rows(config: TransfusionConfig) -> list[Row]:
    rows = [row for name in ("patch_encoder.proj", "patch_decoder.proj") for row in _linear(name, name)]
    time = _linear("patch_encoder.time_proj", "patch_encoder.time_proj")
    if config.time_injection == "post_linear":
        time = [Row(row.official, None) for row in time]
    return rows + time


def _unet_rows() -> list[Row]:
    rows = _conv("patch_encoder.conv_in") + _norm("patch_encoder.norm_out")
    rows += _linear("patch_encoder.proj_out", "patch_encoder.proj_out")
    rows += _linear("patch_decoder.proj_in", "patch_decoder.proj_in")
    rows += _norm("patch_decoder.norm_out") + _conv("patch_decoder.conv_out")
    for level, resample in (("patch_encoder.down.{i}", "downsample"), ("patch_decoder.up.{i}", "upsample")):
        block, attention = f"{level}.res.{{j}}", f"{level}.attn.{{j}}"
        for name in ("conv1", "conv2", "shortcut"):
            rows += _conv(f"{block}.{name}")
        rows += _norm(f"{block}.norm1") + _norm(f"{block}.norm2") + _norm(f"{attention}.norm")
        rows += _linear(f"{block}.time_proj", f"{block}.time_proj") + _linear(f"{attention}.o", f"{attention}.out")
        for official, ours in (("q", "query"), ("k", "key"), ("v", "value")):
            rows.append(Row(f"{attention}.{official}.weight", f"{attention}.{ours}.kernel", LINEAR))
        rows += _conv(f"{level}.{resample}", f"{level}.resample")
    return rows


def _conv(official: str, ours: str | None = None) -> list[Row]:
    ours = ours or official
    return [Row(f"{official}.weight", f"{ours}.kernel", CONV), Row(f"{official}.bias", f"{ours}.bias", SAME)]


def _norm(name: str) -> list[Row]:
    return [Row(f"{name}.weight", f"{name}.scale", SAME), Row(f"{name}.bias", f"{name}.bias", SAME)]


def _linear(official: str, ours: str) -> list[Row]:
    return [Row(f"{official}.weight", f"{ours}.kernel", LINEAR), Row(f"{official}.bias", f"{ours}.bias", SAME)]
