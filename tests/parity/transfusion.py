"""Transfusion's reference model: every case of a `ref_linear` or `ref_unet` folder.

The bounds of the golden's README (1e-5, and 5e-5 where the sampler starts at a high t, relative to at least 1) hold
beside the general one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxmm.attention import visible
from jaxmm.diffusion import ddpm as ddpm_math
from jaxmm.layers.rotary import rotary_tables
from jaxmm.models.transfusion import SYSTEM, TransfusionConfig, decode
from jaxmm.models.transfusion.config import UNetConfig
from jaxmm.models.transfusion.layout import Picture, arrange, bucket_name
from jaxmm.models.transfusion.objective import SolverOptions
from jaxmm.sequence import OPEN, Budget, build_batch
from jaxmm.transformer import TokenSampler

CLOSE = 1e-5


def config_of(golden, **changes) -> TransfusionConfig:
    c = golden.config
    fields = dict(
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        head_size=c.get("head_dim"),
        mlp_width=c["intermediate_size"],
        vocab_size=c["vocab_size"],
        **{f"{name}_id": c[f"{name}_token_id"] for name in ("bos", "eos", "boi", "eoi", "pad")},
        tie_embeddings=c["tie_word_embeddings"],
        image_size=golden.cases["ddpm/x_T"].shape[1:],
        latent_channels=c["latent_channels"],
        patch_size=c["patch_size"],
        patch_codec=c["patch_encoder"],
        unet=UNetConfig(
            channels=tuple(c["unet_channels"]),
            blocks=c["unet_num_res_blocks"],
            attention_levels=tuple(c["unet_attention_levels"]),
            heads=c["unet_attention_heads"],
            norm=c["unet_norm"],
            norm_groups=c["unet_norm_groups"],
            norm_eps=c["unet_norm_eps"],
        ),
        time_features=c["time_freq_dim"],
        time_width=c["time_embed_dim"],
        time_max_period=c["time_max_period"],
        time_injection=c["time_injection"],
        diffusion_steps=c["num_train_timesteps"],
        cosine_offset=c["cosine_s"],
        max_beta=c["max_beta"],
        image_loss_weight=c["lambda_diffusion"],
        norm_eps=c["rms_norm_eps"],
        rope_theta=c["rope_theta"],
    )
    return TransfusionConfig(**fields | changes)


@functools.cache
def model_of(golden, **changes):
    """(blueprint, parameters, table) under a config with changes; weights go through the system's own table."""
    config = config_of(golden, **changes)
    blueprint = SYSTEM.blueprint(config)
    table = SYSTEM.table(config, blueprint)
    params, _ = table.read(golden.weights)
    return config, blueprint, jax.tree.map(jnp.asarray, params), table


def hwc(image):
    return np.moveaxis(image, -3, -1)


def chw(image):
    return np.moveaxis(np.asarray(image), -1, -3)


def parts_of(ids, image_ids, pictures):
    """Ids and pictures in the order of reading; every run of one image number takes the next picture."""
    parts, last = [], 0
    for token, image in zip(ids, image_ids):
        if image == 0:
            parts.append(int(token))
        elif image != last:
            parts.append(next(pictures))
        last = image
    return parts


class Inputs:
    """The batch of a training case, built by our layouts and our packer, beside its golden tensors.

    `slots` says where each golden image is in the batch: (bucket, row, number within its bucket).
    """

    def __init__(self, golden, case: str, config: TransfusionConfig):
        cases = golden.cases
        self.ids, self.image_ids = cases[f"{case}/input_ids"], cases[f"{case}/image_ids"]
        shape = self.ids.shape
        docs = cases[f"{case}/doc_ids"] if f"{case}/doc_ids" in cases else np.ones(shape, int)
        self.valid = cases[f"{case}/valid"].astype(bool) if f"{case}/valid" in cases else docs > 0
        self.latents = [hwc(x) for x in cases.series(f"{case}/latents")]
        self.noise = [hwc(x) for x in cases.series(f"{case}/noise")]
        self.rows = [(b, n) for b, row in enumerate(self.image_ids) for n in sorted(set(row) - {0})]
        pictures = iter([Picture(x) for x in self.latents])
        layouts = []
        for b in range(shape[0]):
            runs = [self.valid[b] & (docs[b] == d) for d in sorted(set(docs[b][self.valid[b]]))]
            layouts.append([arrange(config, parts_of(self.ids[b][r], self.image_ids[b][r], pictures)) for r in runs])
        self.slots, counts, shapes = [], {}, {}
        for (b, _), latent in zip(self.rows, self.latents):
            bucket = bucket_name(latent.shape)
            self.slots.append((bucket, b, counts.get((bucket, b), 0)))
            counts[bucket, b], shapes[bucket] = self.slots[-1][2] + 1, latent.shape
        most = {bucket: max(n for (name, _), n in counts.items() if name == bucket) for bucket in shapes}
        budget = Budget({"tokens": shape[1]}, {bucket: (most[bucket], shapes[bucket]) for bucket in shapes})
        self.batch = build_batch(layouts, budget)
        self.tokens = self.batch.streams["tokens"]

    def by_bucket(self, values):
        """One array per image -> {bucket: [B, N, ...]}."""
        out = {}
        for (bucket, b, n), value in zip(self.slots, values):
            slots = self.batch.images[bucket].slot
            out.setdefault(bucket, np.zeros((*slots.shape, *np.shape(value)), np.float32))[b, n] = value
        return out

    def mask(self):
        """Our mask; padded rows see themselves alone, as the golden's do."""
        seen = np.asarray(visible(self.tokens.places, self.tokens.intervals))
        return np.where(self.valid[:, :, None], seen, np.eye(self.ids.shape[1], dtype=bool)).astype(np.uint8)

    def losses(self, blueprint, params, times, weights, gradient=False):
        """(total loss, terms, notes), and with `gradient` the gradient of the total."""
        arguments = [self.by_bucket(x) for x in (self.latents, self.noise, times)]

        def run(params):
            terms, notes = blueprint.bind(params).loss_at(self.batch, *arguments)
            return sum(weights[name] * term.value() for name, term in terms.items()), (terms, notes)

        if not gradient:
            total, (terms, notes) = jax.jit(run)(params)
            return total, terms, notes
        (total, (terms, notes)), found = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
        return total, terms, notes, found

    def per_image(self, notes, name):
        """One of the notes {name/bucket: [B, N, ...]} as a list, one array per image."""
        return [np.asarray(notes[f"{name}/{bucket}"])[b, n] for bucket, b, n in self.slots]


def compare_losses(golden, case, inputs, total, terms, notes, image_loss="ddpm_loss", **named):
    """The parts that all training cases share; `named` maps a golden series to one of our notes."""
    golden.check(f"{case}/total_loss", total, suggested=CLOSE)
    golden.check(f"{case}/lm_loss", terms["text"].value(), suggested=CLOSE)
    golden.check(f"{case}/{image_loss}", terms["image"].value(), suggested=CLOSE)
    if f"{case}/{image_loss}_per_image" in golden.cases:
        each = np.stack(inputs.per_image(notes, "image_loss"))
        golden.check(f"{case}/{image_loss}_per_image", each, suggested=CLOSE)
    for series, note in named.items():
        for i, ours in enumerate(inputs.per_image(notes, note)):
            golden.check(f"{case}/{series}/{i}", chw(ours) if ours.ndim == 3 else ours, suggested=CLOSE)
    for name in ("logits", "final_hidden", "inputs_embeds"):
        if f"{case}/{name}" in golden.cases:
            golden.check(f"{case}/{name}", notes[name], suggested=CLOSE, where=inputs.valid)
    for i, _ in enumerate(golden.cases.names(f"{case}/hidden/")):
        golden.check(f"{case}/hidden/{i}", notes["hidden"][i], suggested=CLOSE, where=inputs.valid)


def compare_layout(golden, case, inputs):
    """Ids, positions, labels and mask, exactly."""
    tokens, valid = inputs.tokens, inputs.valid
    golden.check(f"{case}/input_ids", tokens.ids, where=valid)
    assert np.all(inputs.ids[~valid] == golden.config["pad_token_id"])
    assert np.all(inputs.image_ids[~valid] == 0)
    positions = np.where(valid, tokens.positions, np.arange(valid.shape[1]))
    golden.check(f"{case}/position_ids", positions)
    golden.check(f"{case}/labels", np.where(tokens.weights > 0, tokens.labels, -100))
    golden.check(f"{case}/mask", inputs.mask())
    numbers = np.zeros_like(inputs.image_ids)
    for (b, number), (bucket, _, n), latent in zip(inputs.rows, inputs.slots, inputs.latents):
        slot = inputs.batch.images[bucket].slot[b, n]
        count = latent.shape[0] * latent.shape[1] // golden.config["patch_size"] ** 2
        numbers[b, slot : slot + count] = number
    golden.check(f"{case}/image_ids", numbers)


def weights_of(golden):
    return {"text": 1.0, "image": golden.config["lambda_diffusion"]}


def train(golden):
    config, blueprint, params, table = model_of(golden)
    inputs = Inputs(golden, "train", config)
    compare_layout(golden, "train", inputs)
    golden.check("train/image_rows", np.array(inputs.rows))
    golden.check("train/valid", (inputs.tokens.places >= 0).astype(np.uint8))
    tables = rotary_tables(golden.cases["train/position_ids"][:1], config.transformer.head_size, config.rope_theta)
    golden.check("train/rope_cos", tables[0][0], suggested=CLOSE)
    golden.check("train/rope_sin", tables[1][0], suggested=CLOSE)
    times = golden.cases["train/timesteps"]
    total, terms, notes, gradient = inputs.losses(blueprint, params, times, weights_of(golden), gradient=True)
    for name in ("time_sinusoid", "time_embed"):
        golden.check(f"train/{name}", np.stack(inputs.per_image(notes, name)), suggested=CLOSE)
    named = dict(patch_embeds="patch_embeds", x_t="noised", eps_pred="prediction")
    compare_losses(golden, "train", inputs, total, terms, notes, **named)
    gradient = table.write(gradient)
    for name in golden.cases.names("train/grad/"):
        golden.check(name, gradient[name.removeprefix("train/grad/")], suggested=CLOSE)
    for key, value in gradient.items():
        golden.check(f"train/grad_norm/{key}", np.linalg.norm(value), suggested=CLOSE)


def variant(golden, case, **changes):
    """The training batch under another option."""
    config, blueprint, params, _ = model_of(golden, **changes)
    inputs = Inputs(golden, "train", config)
    total, terms, notes = inputs.losses(blueprint, params, golden.cases["train/timesteps"], weights_of(golden))
    named = dict(eps_pred="prediction")
    if golden.cases.names(f"{case}/patch_embeds/"):
        named["patch_embeds"] = "patch_embeds"
    compare_losses(golden, case, inputs, total, terms, notes, **named)
    if f"{case}/mask" in golden.cases:
        golden.check(f"{case}/mask", inputs.mask())


def causal(golden):
    variant(golden, "causal", bidirectional=False)


def post_linear(golden):
    variant(golden, "post_linear", time_injection="post_linear")


def norm_group(golden):
    variant(golden, "norm_group", unet=dataclasses.replace(config_of(golden).unet, norm="group"))


def packed(golden):
    config, blueprint, params, _ = model_of(golden)
    inputs = Inputs(golden, "packed", config)
    compare_layout(golden, "packed", inputs)
    total, terms, notes = inputs.losses(blueprint, params, golden.cases["packed/timesteps"], weights_of(golden))
    compare_losses(golden, "packed", inputs, total, terms, notes, eps_pred="prediction")
    valid, starts = inputs.tokens.places >= 0, inputs.tokens.positions == 0
    golden.check("packed/doc_ids", np.where(valid, np.cumsum(starts & valid, axis=1), 0))


def flow(golden):
    config, blueprint, params, _ = model_of(golden, objective="flow")
    inputs = Inputs(golden, "train", config)
    total, terms, notes = inputs.losses(blueprint, params, golden.cases["flow/t"], weights_of(golden))
    named = dict(x_t="noised", v_target="target", v_pred="prediction")
    compare_losses(golden, "flow", inputs, total, terms, notes, "flow_loss", **named)


def schedule(golden):
    c, cases = golden.config, golden.cases
    ours = ddpm_math.cosine_schedule(c["num_train_timesteps"], c["cosine_s"], c["max_beta"])
    np.testing.assert_allclose(ours.betas, cases["schedule/beta"], rtol=1e-12)
    np.testing.assert_allclose(ours.alphas_bar, cases["schedule/alpha_bar"], rtol=1e-11)
    for name in cases.names("schedule/timesteps_"):
        _, count, spacing = name.split("/")[1].split("_")
        golden.check(name, ddpm_math.spaced(ours.steps, int(count), spacing)[::-1])


def read_prompt(golden, config, blueprint, params, ids, image_ids=None, latent=None, extra=0):
    """Read one prompt, through the cache."""
    image_ids = np.zeros_like(ids) if image_ids is None else image_ids
    picture = iter([] if latent is None else [Picture(hwc(latent), 0.0, 0.0)])
    layout = arrange(config, parts_of(ids, image_ids, picture), end=OPEN)
    assert np.array_equal(layout.streams["tokens"].ids, ids)
    batch = decode.prompt_batch(config, [layout])
    slots = batch.streams["tokens"].length + extra
    return jax.jit(lambda p: decode.read(blueprint.bind(p), batch, slots))(params)


def sample(golden, case, *, image=None, objective="ddpm", **options):
    """One guided trajectory from the initial noise of the ddpm case."""
    cases = golden.cases
    config, blueprint, params, _ = model_of(golden, objective=objective)
    prompts = case if image is not None else "ddpm"
    patches = config.patches(*config.image_size)
    rows, guide = (
        read_prompt(
            golden,
            config,
            blueprint,
            params,
            cases[f"{prompts}/{branch}_ids"],
            None if image is None else cases[f"{prompts}/{branch}_image_ids"],
            image,
            patches,
        )
        for branch in ("cond", "uncond")
    )
    fresh = jnp.asarray(hwc(cases["ddpm/step_noise"]))[:, None, None]
    noise = jnp.asarray(hwc(cases["ddpm/x_T"]))[None, None]
    trajectory = cases[f"{case}/trajectory"]
    indices = cases[f"{case}/timesteps"] if f"{case}/timesteps" in cases else None
    scale = float(cases[f"{case}/cfg"])
    options = SolverOptions(steps=len(trajectory), guidance=scale, **options)
    active = jnp.ones(1, bool)

    @jax.jit
    def run(params):
        model = blueprint.bind(params)
        return decode.draw_latents(model, rows, guide, noise, lambda i: fresh[i], active, options, indices)[1]

    bound = 5e-5 if options.clip is not None else CLOSE
    golden.check(f"{case}/trajectory", chw(run(params)[:, 0, 0]), suggested=bound)
    if not cases.names(f"{case}/first_eps"):
        return

    @jax.jit
    def predict(params, rows):
        t = jnp.full((1, 1), indices[0], jnp.float32)
        return decode.predict_image(blueprint.bind(params), rows, noise, t, active)[0]

    cond, uncond = predict(params, rows), predict(params, guide)
    guided = uncond + scale * (cond - uncond)
    for name, ours in (("first_eps_cond", cond), ("first_eps_uncond", uncond), ("first_eps", guided)):
        if f"{case}/{name}" in cases:
            golden.check(f"{case}/{name}", chw(ours[0, 0]), suggested=CLOSE)


def ddpm(golden):
    sample(golden, "ddpm")


def ddpm_clip(golden):
    sample(golden, "ddpm_clip", variance="large", clip=float(golden.cases["ddpm_clip/clip_x0"]))


def ddim(golden):
    sample(golden, "ddim", solver="ddim")


def flow_euler(golden):
    assert int(golden.cases["flow_euler/num_steps"]) == len(golden.cases["flow_euler/trajectory"])
    sample(golden, "flow_euler", objective="flow")


def edit(golden):
    sample(golden, "edit", image=golden.cases["edit/context_latent"])


def greedy(golden, case, image=None):
    """Greedy decoding through the cache, token by token."""
    cases = golden.cases
    config, blueprint, params, _ = model_of(golden)
    image_ids = None if image is None else cases[f"{case}/prompt_image_ids"]
    new_ids = cases[f"{case}/new_ids"]
    ids = cases[f"{case}/prompt_ids"]
    rows = read_prompt(golden, config, blueprint, params, ids, image_ids, image, len(new_ids))
    keys, active = jax.random.split(jax.random.key(0), 1), jnp.ones(1, bool)

    @jax.jit
    def step(params, rows):
        return decode.write_text(blueprint.bind(params), rows, keys, active, 1, TokenSampler(), ())

    logits, written = [], []
    for _ in new_ids:
        logits.append(np.asarray(rows.logits[0]))
        rows, token = step(params, rows)
        written.append(int(token[0, 0]))
    logits = np.stack(logits)
    top = np.sort(logits, axis=-1)
    golden.check(f"{case}/new_ids", np.array(written))
    golden.check(f"{case}/logits", logits, suggested=CLOSE)
    golden.check(f"{case}/margin", top[:, -1] - top[:, -2], suggested=CLOSE)


def text(golden):
    greedy(golden, "text")


def caption(golden):
    greedy(golden, "caption", golden.cases["edit/context_latent"])


def after_image(golden):
    golden.check("after_image/image", golden.cases["ddpm/trajectory"][-1])
    greedy(golden, "after_image", golden.cases["after_image/image"])


_COMPARATORS = (train, causal, post_linear, norm_group, packed, flow, schedule, ddpm, ddpm_clip, ddim, flow_euler, edit)
CASES = {f.__name__: f for f in (*_COMPARATORS, text, caption, after_image)}
