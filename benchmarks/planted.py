"""Plants faults in a copy of the project, one at a time, and tells which the tests of their own room see.

    python benchmarks/planted.py                     # all; a fault with a known result is not planted again
    python benchmarks/planted.py --count 20 --seed 1 # a random part of the list
    python benchmarks/planted.py --only flow/path.py

A fault is a plausible mistake: a wrong sign, index, constant, order, type or variable, or a missing detach. It is seen
if one of its room's tests fails. The working tree is not changed. Results go to runs/planted.jsonl, a line for each
fault; a result holds until the fault, its file or its tests change. The tests must pass without faults. Exit status 1
means that a fault was not seen. Linux only; about 15 seconds a fault on one core.
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
IMPORTED = (  # once, and not again for each fault
    "diffusers.models", "lightning", "matplotlib.figure", "pytest", "sklearn.datasets", "timm.layers", "timm.optim",
    "timm.scheduler", "torchmetrics.image", "torchvision", "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5", "wandb",
)  # fmt: skip
LIMIT = 900  # seconds; a fault whose tests do not end is seen

# (file, its tests without tests/test_ and .py) → pairs of a text that occurs once in the file and what replaces it
FAULTS: dict[tuple[str, str], list[tuple[str, str]]] = {
    ("flow/path.py", "flow_path flow_chain"): [
        ("return -math.pi / 2 * b, math.pi / 2 * a", "return -math.pi / 2 * a, math.pi / 2 * b"),
        ("r = 2 * self._log_ratio(t)", "r = self._log_ratio(t)"),
        ("torch.exp(-integral / 2), variance if", "torch.exp(-integral), variance if"),
        ("2 * torch.asinh(ratio / 2) if", "torch.asinh(ratio / 2) if"),
        ("return -a * b**2 * speed,", "return -a * b * speed,"),
        (".clamp(max=0.999)", ".clamp(max=0.99)"),
        ("(t * self.steps).ceil().clamp", "(t * self.steps).round().clamp"),
        ("(root - root[-1]) * root[0] / (root[0] - root[-1])", "(root - root[-1]) / (root[0] - root[-1])"),
    ],
    ("flow/target.py", "flow_target"): [
        ("(b**2 + (self.sigma_data * a) ** 2).sqrt()", "(b**2 + self.sigma_data * a**2).sqrt()"),
        ("return -b, a", "return -a, b"),
    ],
    ("flow/density.py", "flow_density flow_shift"): [
        ("torch.sin(math.pi * (low + high) / 2)", "torch.cos(math.pi * (low + high) / 2)"),
        ("math.sqrt(2 * math.pi) * t * (1 - t))", "math.sqrt(2 * math.pi))"),
        ("torch.randperm(count, generator=generator)", "torch.arange(count)"),
        ("shifted.clamp(max=1), t)", "shifted, t)"),
        ("shifted.clamp(max=1), t)", "shifted.clamp(max=1), shifted)"),
    ],
    ("flow/sampler.py", "flow_sampler_calls"): [
        ("(sigma * (1 + gamma)).minimum(most)", "sigma * (1 + gamma)"),
    ],
    ("storage/text.py", "storage_text"): [
        ("if name.value in known:", "if name in known:"),
    ],
    ("flow/weight.py", "flow_weight"): [
        (".clamp(max=1)", ".clamp(min=1)"),
        ("(log_snr / 2 + self.mean)", "(log_snr / 2 - self.mean)"),
    ],
    ("flow/grid.py", "flow_grid"): [
        ("rho: float = 7.0", "rho: float = 5.0"),
        ("shift(torch.tensor(0.001), alpha).double()", "torch.tensor(0.001).double()"),
    ],
    ("flow/objective.py", "flow_objective flow_shift flow_penalty flow_teacher flow_chain"): [
        ("(t.detach() * self.count).long()", "(t.detach() * self.count).round().long()"),
        ("math.sqrt(area / self.shift_area)", "area / self.shift_area"),
        ("self.path.training_time(shift(self.density(u), self.alpha(area))).float()",
         "shift(self.density(u), self.alpha(area)).float()"),
        ("with torch.no_grad():\n                y = field", "with torch.enable_grad():\n                y = field"),
        ("            loss = self.penalty(loss, t)\n        if self.weight is not None:\n"
         "            loss = self.weight(self.path, self.target, t) * loss\n",
         "            w = 1 if self.weight is None else self.weight(self.path, self.target, t)\n"
         "            return self.penalty(w * loss, t)\n        if self.weight is not None:\n"
         "            loss = self.weight(self.path, self.target, t) * loss\n"),
        ("self.sums.zero_()\n        return", "return"),
    ],
    ("flow/sampler.py", "flow_sampler_diffusers flow_sampler_papers flow_sampler_order"): [
        ("step * (v + noise - x0) / 2", "step * (noise - x0)"),
        ("h / (2 * last[1]) * (x0 - last[0])", "last[1] / (2 * h) * (x0 - last[0])"),
        ("eta**2 * posterior(path, t, s).small", "eta * posterior(path, t, s).small"),
        ('exact.small if variance == "small" else exact.large', 'exact.large if variance == "small" else exact.small'),
        ("x - step / 2 * sigma * e", "x - step * sigma * e"),
        ("churn / (len(grid) - 1)", "churn / len(grid)"),
    ],
    ("flow/guidance.py", "flow_guidance"): [
        ("(std_cond / std)", "(std / std_cond)"),
        ("(y_cond - self.weak.model(", "(y - self.weak.model("),
        ("noise=torch.where(mask > 0, estimate.noise, noise)", "noise=estimate.noise"),
        ("plain, rest = y[:, : self.channels], y_cond[:, : self.channels]",
         "plain, rest = y[:, : self.channels], y[:, : self.channels]"),
    ],
    ("flow/guidance.py", "flow_guiders"): [
        ("x0, v = w - tau * cond, cond - null", "x0, v = w - tau * null, cond - null"),
        ("self._carried(t, -tau * v) / tau", "self._carried(t, -v)"),
        ("self.latest = difference + self.momentum * self.earlier", "self.latest = difference"),
        ("if self.time != float(t):", "if True:"),
        ("self.threshold / (tau * v.flatten(1)", "self.threshold / (v.flatten(1)"),
        ("v - (1 - self.eta) * _along(v, x0)", "v - self.eta * _along(v, x0)"),
        ("null = _along(cond, null)", "null = _along(null, cond)"),
        ("bool(t > self.times[self.zero_steps])", "bool(t >= self.times[self.zero_steps])"),
    ],
    ("flow/target.py", "flow_guiders"): [
        ("((a * q - b * p) * v + (p + q) * z) / (a + b)", "((a * q - b * p) * v + (p + q) * z)"),
    ],
    ("flow/meanflow.py", "flow_meanflow flow_meanflow_objective training_cost"): [
        ("self.extra_passes = 2 * share", "self.extra_passes = share"),
        ("u[2] < self.share", "u[2] > self.share"),
        ("(1 - self.step) / self.step * (found", "1 / self.step * (found"),
        ("z - expand_as(t - s, z) * model(z, t, selected, t)", "z - expand_as(t - s, z) * model(z, t, selected, end)"),
        ("@torch.no_grad()\ndef average_after_step", "def average_after_step"),
        ("@torch.no_grad()\ndef average_velocity", "def average_velocity"),
        ("torch.ones_like(point[1])", "-torch.ones_like(point[1])"),
    ],
    ("flow/stepmap.py", "flow_density_few_steps"): [
        ("self.path.snap(shift(self.density(u), self.alpha(area))).float()",
         "shift(self.density(u), self.alpha(area)).float()"),
        ("return self.training_time(t, area)", "return self.path.training_time(t)"),
    ],
    ("flow/stepmap.py", "flow_matching"): [
        ("with torch.no_grad():\n            euler", "if True:\n            euler"),
        ("step += t <= later.item() + 1e-5", "step += t < later.item() - 1e-5"),
        ("trailing(self.path, self.k, self.alpha(noise[0, 0].numel()))", "trailing(self.path, self.k)"),
    ],
    ("flow/matching.py", "flow_matching"): [
        ("(fake - real) / size", "(real - fake) / size"),
        ("point_and_target(x0.detach(), noise, t, condition,", "point_and_target(x0, noise, t, condition,"),
        ("- gradient).detach())", "- gradient))"),
        ("objective.alpha(area)", "1.0"),
    ],
    ("flow/likelihood.py", "flow_likelihood"): [
        ("estimate.noise - estimate.x0", "estimate.x0 - estimate.noise"),
        ("Normal(0.0, std)", "Normal(0.0, 1.0)"),
        ("-(log_density / dimensions + math.log(width))", "-(log_density / dimensions - math.log(width))"),
        ("above = torch.where(x0 >= high - width / 4, infinite, above)", "pass"),
        ("flip = below > 0", "flip = below > math.inf"),
        ("+ b**2 - 1 - 2 * b.log()", "+ b**2 - 1 - b.log()"),
        ("(pull(probe.to(v))[0] * probe)", "pull(probe.to(v))[0]"),
    ],
    ("flow/sampler.py", "flow_sampler_distribution"): [
        ('"sbdm": b * rate_b - b**2 * rate_a / a', '"sbdm": b * rate_b + b**2 * rate_a / a'),
        ("(2 * strength * (t - s)).sqrt()", "(strength * (t - s)).sqrt()"),
        ("step / 2 * b * e", "step * b * e"),
    ],
    ("flow/likelihood.py", "flow_likelihood training_autoencoder"): [
        ("(last - first) / points / 2", "(last - first) / points"),
        ("share * x0**2 - share - math", "share * x0**2 + share - math"),
        ("(drawn**2 + log_variance - z**2) / 2", "(drawn**2 - z**2) / 2"),
        ("(groups.logsumexp(1) - math.log(k))", "groups.logsumexp(1)"),
    ],
    ("pipeline/likelihood.py", "training_autoencoder"): [
        ("log_variance - 2 * math.log(self.vae.scale)", "log_variance"),
        ("mean / self.vae.scale + self.vae.shift", "mean / self.vae.scale"),
    ],
    ("training/autoencoder.py", "training_autoencoder"): [
        ("2 / (self.levels - 1), -1.0, 1.0", "1 / (self.levels - 1), -1.0, 1.0"),
        ("first = held[\"step\"]", "first = held[\"step\"] - 1"),
    ],
    ("pipeline/cascade.py", "sample_upscale"): [
        ("picture=pictures, level=level", "picture=pictures"),
        ("if height <= size[0] or", "if"),
        ("size = (height, width)", "pass"),
        ("steps=steps or pipe", "steps=pipe"),
        ("prompts if prompt is None else [prompt] * len", "prompts if not prompt else [prompt] * len"),
        ("pipe.sampling, prompts if prompt is None else [prompt])", "pipe.sampling, prompts)"),
        ("if len(given) == len(texts) else", "if False else"),
        ("pipe.plan(pipe.sampling)", "pass"),
    ],
    ("benchmarks/latency.py", "benchmarks_latency"): [
        ("self.evaluations += len(inputs[0])", "self.evaluations += 1"),
        ("self.evaluations, self.seconds = 0, dict", "self.seconds = dict"),
        ('" " * turn', '""'),
        ("pipe.text.keep(True)", "pass"),
        ("(0.25, 0.75)", "(0, 1)"),
    ],
    ("pipeline/likelihood.py", "evaluate_likelihood"): [
        ("pipe.codec.width(levels)", "1 / (levels - 1)"),
        ("normal().double(), levels)", "normal().double(), levels + 1)"),
    ],
    ("flow/variance.py", "flow_variance"): [
        ("v = (output + 1) / 2", "v = output"),
        ("(x0 - estimate.detach())", "(x0 - estimate)"),
        ("a_s * large / b_t**2)", "a_t * large / b_t**2)"),
        ("self.vlb_weight * steps / math.log(2)", "self.vlb_weight / math.log(2)"),
        ("posterior(path, second, second / 2).small, exact.small", "exact.large, exact.small"),
    ],
    ("web/form.py", "web_form"): [
        ('if value.startswith("-") else', "if False else"),
        ("covered |= ", "covered &= "),
        ('"guide_from": str(begin)', '"guide_from": str(end)'),
        ("if self.guide_from or self.guide_to:", "if self.guide_from:"),
    ],
    ("web/job.py", "web_job"): [
        ("if self.stop.is_set():", "if False:"),
        ("            self.stop.set()\n", "            pass\n"),
        ("if batch == 1:", "if batch:"),
        ("SHARE * (now - self.begun)", "(now - self.begun)"),
        ("except Exception as found:", "except KeyboardInterrupt as found:"),
    ],
    ("web/walk.py", "web_job"): [
        ("rest = points - along[:, None] * chord", "rest = points"),
        ("across / along[-1]", "across"),
    ],
    ("web/shelf.py", "web_job"): [
        ("files = [path, *(Adapter", "files = [*(Adapter"),
        ("options, max(map(written, files)))", "options, written(path))"),
        ("> KEPT", "> KEPT + 1"),
    ],
    ("web/choices.py", "web_choices"): [
        ("if frozenset(pair[1:]) not in done", "if frozenset(pair[1:])"),
        ("if not any(frozenset((better", "if any(frozenset((better"),
        ("range(0, len(files) - 1, 2)", "range(0, len(files), 2)"),
        ("rows = [*chosen(folder), ", "rows = ["),
    ],
    ("flow/penalty.py", "flow_penalty"): [
        ("self.c ** (2 * t)", "self.c**t"),
    ],
    ("flow/search.py", "flow_search"): [
        ("(fine.tau[j] - fine.tau[i]) * v", "(fine.tau[i + 1] - fine.tau[i]) * v"),
        ("for move in (-stride, stride):", "for move in (stride,):"),
    ],
    ("mmdit/layers.py", "mmdit"): [
        ("F.layer_norm(x, x.shape[-1:], eps=1e-6)", "F.layer_norm(x, x.shape[-1:], eps=1e-3)"),
        ("shift, scale = self.modulation(vector)", "scale, shift = self.modulation(vector)"),
        ("self.dual.attend(modulate(image, dual.shift", "self.dual.attend(modulate(x, dual.shift"),
        ("act_layer=GELUTanh)", "act_layer=nn.GELU)"),
        ("return self.norm_q(q) if", "return self.norm_k(q) if"),
    ],
    ("mmdit/adapters.py", "mmdit_adapters mmdit_lora"): [
        ("start = rows.stop", "start = 0"),
        ("swap if piece.swapped", "None if piece.swapped"),
        ('"lora_unet_", "original", flat=True', '"lora_unet_", "diffusers", flat=True'),
    ],
    ("storage/updates.py", "mmdit_adapters mmdit_lora"): [
        ("value + strength * delta", "value + delta"),
        ("dim=magnitude.shape.index(1)", "dim=1"),
        ("/ whole.norm(", "/ value.norm("),
        ("* one * two", "* (one + two)"),
        ("torch.kron(one, two)", "torch.kron(two, one)"),
        ('"lokr_w2_b", "lokr_w1_b")  #', '"lokr_w1_b")  #'),
        ("math.sqrt(rank) if", "rank if"),
        ("value.to(torch.float32, copy=True)", "value.clone()"),
        ("self._ours(found) if len(found)", "found if len(found)"),
        ('{"up_bias": self.scale, ', '{"up_bias": 1.0, '),
        ('self.bias() if name == "bias" else', "self.weight() if True else"),
        ("value[update.rows] = update", "value[:] = update"),
    ],
    ("storage/updates.py", "data_text_adapters pipeline_adapters"): [
        ("update.scale, strength, digest", "strength, digest"),
        ("update.scale, strength, digest", "update.scale, digest"),
        ("key.removeprefix(component)", 'key.rpartition(".")[2]'),
        ("if not receiver.places", "if receiver.places"),
        ("any(one.updates for", "any(True for"),
        ("not place.bias or", "False or"),
    ],
    ("data/text/adapters.py", "data_text_adapters pipeline_adapters"): [
        ('"text_encoders.clip_g.transformer.", "lora_te2_"', '"text_encoders.clip_g.transformer.", "lora_te1_"'),
        ('flat=to == "kohya"', "flat=False"),
        ('f"{layer}.bias" in shapes', "True"),
        ("Scale(weights, {}, names.diffusers)", 'Scale(weights, {"lora_alpha": 1}, names.diffusers)'),
    ],
    ("data/text/tower.py", "data_text_adapters pipeline_adapters"): [
        ("content += updates.fingerprint(self.updates)", "pass"),
        ("if self.prefix or self.updates or", "if self.prefix or"),
        ("torch.bfloat16 if value.dtype.itemsize == 1 else value.dtype", "value.dtype"),
        ("value = self._updated(name, value.to(device))", "value = value.to(device)"),
    ],
    ("data/text/inversion.py", "training_words"): [
        ("lstrip=True, rstrip=True", "lstrip=False, rstrip=False"),
        ("ids // BASE, ids % BASE", "ids % BASE, ids // BASE"),
        ("key=len, reverse=True", "key=len"),
        ("(ids - self.first).clamp(min=0)", "(ids - self.first - 1).clamp(min=0)"),
    ],
    ("data/text/tower.py", "training_words"): [
        ("module.text_model.eos_token_id = self.end", "pass"),
        ("len(tokenizer) - len(rows)", "len(rows)"),
    ],
    ("training/reader.py", "training_words"): [
        ("* layer.scaling[\"default\"]", ""),
        ("made.pooled.to(pooled.dtype)", "pooled[:, slot.pooled]"),
    ],
    ("mmdit/layers.py", "mmdit_conv"): [
        ("i=grid[0]", "j=grid[0]"),
        ("self.conv2(F.silu(self.conv1(places)))", "self.conv1(F.silu(self.conv2(places)))"),
        ("self.conv2 = nn.Conv2d(width, width, 3, padding=1)", "self.conv2 = nn.Conv2d(width, width, 1)"),
    ],
    ("benchmarks/decisions.py", "benchmarks_decisions"): [
        ("(2 * t**2)", "(2 * t)"),
        ("z[:, None] - (1 - t) * latents", "z[:, None] - latents"),
    ],
    ("studies/speed.py", "study_speed"): [
        ("return fewer * (more / fewer) ** share", "return fewer + (more - fewer) * share"),
        ("1 / length[name] / cost", "cost / length[name]"),
    ],
    ("mmdit/embed.py", "mmdit"): [
        ("(side - height) // 2, (side - width) // 2", "(side - height + 1) // 2, (side - width + 1) // 2"),
    ],
    ("mmdit/model.py", "mmdit mmdit_numbers"): [
        ("isinstance(module, JointBlock | FinalLayer):", "isinstance(module, JointBlock):"),
        ("nn.init.zeros_(embedding.fc2.weight)", "nn.init.normal_(embedding.fc2.weight, std=0.02)"),
        ("is None else t - end", "is None else end"),
        ("(condition.guidance, TIME_FEATURES, 1.0)", "(condition.guidance, TIME_FEATURES)"),
    ],
    ("storage/factors.py", "mmdit_adapters"): [
        ("scale * len(down)", "scale"),
        ("scale * up", "up"),
    ],
    ("mmdit/convert.py", "mmdit_adapters"): [
        ("swap(update.up) if two and naming", "update.up if two and naming"),
        ("torch.block_diag(*ups)", "torch.cat([*ups], dim=1)"),
        ("whole.up.chunk(count)", "whole.up.chunk(count)[::-1]"),
    ],
    ("mmdit/quantized.py", "mmdit_quantized"): [
        ("(levels[1:] + levels[:-1]) / 2", "levels[1:]"),
        ("16 * nearest[::2] + nearest[1::2]", "16 * nearest[1::2] + nearest[::2]"),
        ("gradient @ ctx.layer.weight(ctx.dtype)", "gradient @ ctx.layer.weight(ctx.dtype).sign()"),
        ("amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127", "amax().clamp(min=1e-9) / 127"),
        ("type(module) is nn.Linear and not module.weight.requires_grad", "type(module) is nn.Linear"),
    ],
    ("data/raw/base.py", "encode_mirrored"): [
        ("self.source.read(own, start)", "self.source.read(own)"),
        ('re.sub(f"({CROPPED}[0-9]+)?({MIRRORED})?$", "", name)', "name"),
    ],
    ("data/store/encoding.py", "encode_mirrored"): [
        ("ImageOps.mirror(image) if mirrored", "ImageOps.flip(image) if mirrored"),
    ],
    ("data/drawn.py", "sample_like"): [
        ('if found.get("guidance") == 1', 'if found.get("guidance") == 0'),
        ("for name in FLAGS if name not in idle", "for name in found if name not in idle"),
    ],
    ("mmdit/lora.py", "mmdit_lora"): [
        ('up = up * layer.scaling["default"]', "up = up * 1.0"),
    ],
    ("mmdit/prior.py", "mmdit_prior"): [
        ("q[:, -kept:], k, v, mask[:, :, -kept:]", "q[:, -kept:], k, v, mask[:, :, :kept]"),
        ("own.new_ones(length, length).tril()", "own.new_ones(length, length)"),
        ("real[:, None, None]).logical_or(own)", "real[:, None, None])"),
        ("F.pad(condition.mask, (0, ADDED), value=True)", "F.pad(condition.mask, (ADDED, 0), value=True)"),
        ("self.mlp(self.norm_mlp(x))", "self.mlp(self.norm_attention(x))"),
        ("nn.init.zeros_(self.out.weight)", "pass"),
        ("self.largest = 1", "self.largest = 2"),
    ],
    ("mmdit/checkpoint.py", "mmdit_checkpoint"): [
        ('"heads": width // norm[0]', '"heads": width // 64'),
        ("min(128, table * size)", "min(128, table)"),
    ],
    ("baselines/dit.py", "baselines_dit"): [
        ("x = x + self.cross(x, text, mask)", "x = x + self.cross(image, text, mask)"),
        ("nn.init.zeros_(module.proj.weight)", "nn.init.xavier_uniform_(module.proj.weight)"),
    ],
    ("baselines/unet.py", "baselines_unet"): [
        ('"resnet_time_scale_shift": "scale_shift",', ""),
        ('"attention_head_dim": head_dim,', ""),
        ("nn.init.zeros_(self.net.conv_out.bias)", "nn.init.ones_(self.net.conv_out.bias)"),
        ("encoder_attention_mask=condition.mask", "encoder_attention_mask=None"),
    ],
    ("data/order.py", "data_order"): [
        ('["counter"][3] = sample', '["counter"][2] = sample'),
        ("lane.before(epoch) // self.batch_size", "lane.before(1) // self.batch_size * epoch"),
        ("self.shares.append(self.shares[-1]._replace(step=NOT_COUNTED))", "self.shares.append(self.shares[-1])"),
        ("stream(seed, Use.ORDER, epoch, bucket)", "stream(seed, Use.ORDER, epoch)"),
        ("(number << 32) + bucket", "bucket"),
        ("for e in (epoch, epoch + 1)]", "for e in (0, 1)]"),
    ],
    ("data/latents.py", "data_latents"): [
        ("q.logvar + 2 * math.log(self.scale)", "q.logvar + math.log(self.scale)"),
        ("(q.mean - self.shift) * self.scale", "q.mean * self.scale - self.shift"),
    ],
    ("data/clip.py", "data_clip"): [
        ("(embeddings.to(self.mean) - self.mean) / self.std", "(embeddings.to(self.mean) - self.mean) * self.std"),
        ("* self.std + self.mean, dim=-1)", "* self.std, dim=-1)"),
        ("return (pixels - mean) / std", "return pixels - mean"),
        ("tower(centred(pixels)).image_embeds, dim=-1", "tower(centred(pixels)).image_embeds, dim=0"),
        ("found.std(0).float()", "found.std().float().expand(found.shape[1]).contiguous()"),
        ('| {"mean": self.mean, "std": self.std}', ""),
        ("autocast(pixels.device.type, enabled=False)", "autocast(pixels.device.type, enabled=True)"),
    ],
    ("data/embeddings.py", "training_decoder"): [
        ("self.rows[share.stage][share.samples]", "share.samples"),
        ("self.settings.noise * numbers[:, 1]", "self.settings.noise * numbers[:, 0]"),
        ("numbers[:, 0] >= self.settings.dropout", "numbers[:, 0] >= 0.0"),
        (".random((batch_size, 2))[share.positions]", ".random((len(share.positions), 2))"),
        ("if found.null_count:", "if False:"),
    ],
    ("pipeline/embedding.py", "sample_embedding"): [
        ("    drawn: list[Tensor] = []", "    drawn: list[Tensor] = [torch.zeros_like(latents).flatten(1)]"),
        ("F.interpolate(picture, side,", "F.interpolate(picture.flip(-1), side,"),
        ("    return noised(latents, ", "    return noised(0 * latents, "),
    ],
    ("data/store/samples.py", "data_stored data_stages data_sizes"): [
        ("np.searchsorted(ends, u * ends[-1]", "np.searchsorted(ends, u"),
        ("drawn[:, 2:] >= self.encoder_dropout", "drawn[:, 1:-1] >= self.encoder_dropout"),
        ("x0 + (logvar / 2).exp()", "x0 + logvar.exp()"),
        ("[store.sizes(rows), after]", "[after, store.sizes(rows)]"),
        ("int(row) % len(store.weights(int(row)))", "0"),
    ],
    ("data/store/encoding.py", "encode encode_pictures data_latents"): [
        ("mean + (logvar / 2).exp() * noise", "mean + logvar.exp() * noise"),
        ("numbers = np.array([start + i for i, _ in batch])", "numbers = np.array([i for i, _ in batch])"),
        (".to(torch.float32).div(255)", ".to(torch.float32).div(256)"),
    ],
    ("data/raw/buckets.py", "data_raw_buckets"): [
        ("max(ratio, 1 / ratio)", "abs(ratio - 1)"),
    ],
    ("data/raw/pictures.py", "data_raw_pictures"): [
        ("(levels.astype(np.uint32) + 128) // 257", "levels.astype(np.uint32) // 256"),
        ("round(size[1] * scale) - width", "size[1] - width"),
        ("image.size if _sideways(image) else (image.height, image.width)", "(image.height, image.width)"),
    ],
    ("data/text/tower.py", "data_text_clip data_text_sd3"): [
        ("output.hidden_states[-2]", "output.hidden_states[-1]"),
    ],
    ("data/text/sd3.py", "data_text_adapters"): [
        ("self.kept.clear()", "pass"),
        ("        self.rows = self._rows()\n\n    def _refuse", "\n    def _refuse"),
    ],
    ("data/text/sd3.py", "data_text_sd3 data_text_sd3_slots"): [
        ("rows=slice(self.length, None) if", "rows=slice(self.length - 1, -1) if"),
        ("start = {CLIP_G: widths.get(CLIP_L, rest)}", "start = {CLIP_G: widths.get(CLIP_L, 0)}"),
    ],
    ("data/degrade.py", "superresolution"): [
        ("(1 - level) * latents + level * noise", "latents + level * noise"),
        ("align_corners=False", "align_corners=True"),
        ("** 2) / (2 * std**2)", "** 2) / std**2"),
        ('mode="reflect"', 'mode="replicate"'),
    ],
    ("data/batch.py", "data_stored text_mask"): [
        ("mask[:, slot.rows] |= torch", "mask[:, slot.rows] = torch"),
        ("part.copy_(torch.where(kept[:, None], part, vector[slot.pooled]))", "part.copy_(part)"),
        ("batch.mask[:, slot.rows], null_mask[slot.rows])", "batch.mask[:, slot.rows], False)"),
    ],
    ("data/module.py", "data_module superresolution"): [
        ("stream(self.seed, Use.LEVEL, share.step).random(self.batch_size)[share.positions]",
         "stream(self.seed, Use.LEVEL, share.step).random(len(share.positions))"),
        ("normal(self.seed, Use.DEGRADE,", "normal(self.seed, Use.NOISE,"),
        ("rows[drawn[:, 1] < self.caption_dropout] = 0", "rows[drawn[:, 0] < self.caption_dropout] = 0"),
    ],
    ("engine/ema.py", "engine_averages"): [
        ("(1 + step) / (10 + step)", "step / (10 + step)"),
        ("named_parameters()) | dict(network.named_buffers())", "named_parameters())"),
        ("setattr(copied, name, part)", "pass"),
        ("empty if parameter.requires_grad else parameter", "parameter"),
    ],
    ("engine/posthoc.py", "engine_posthoc"): [
        ("np.where(ta <= tb, gb, ga)", "np.where(ta <= tb, ga, gb)"),
        ("(gram @ x - 2 * products)", "(gram @ x - products)"),
        ("total.add_(opened[taken]", "total.add_(opened[last]"),
    ],
    ("engine/meter.py", "engine_meter"): [
        ("time / trainer.world_size for time in times", "time for time in times"),
        ("seconds / steps", "seconds / self.log_every"),
        ("trainer.world_size * self.peak", "self.peak"),
        ("self.since += perf_counter() - began", "pass"),
    ],
    ("engine/guard.py", "engine_guard"): [
        ("torch.maximum(longest, row)", "row"),
        ("row = bad * (row + 1)", "row = row + bad"),
        ("MEMORY = 0.99", "MEMORY = 0.9"),
        ("torch.where(fine > 0, self.usual.lerp(norm, share), self.usual)", "self.usual.lerp(norm, share)"),
    ],
    ("engine/strategy.py", "engine_memory engine_strategy"): [
        (" and number % self.activation_checkpointing_every == 0", ""),
        ("reduce_dtype=torch.float32", "reduce_dtype=dtype"),
    ],
    ("engine/resume.py", "training_schedule engine_resume"): [
        ("self.validated < step:", "self.validated <= step:"),
        ('{"validated": self.validated}', '{"validated": trainer.global_step}'),
    ],
    ("engine/checkpoint.py", "engine_resume engine_strategy"): [
        ("[first - stored.first : last - stored.first]", "[first:last]"),
        ("if step < complete[KEPT - 1]:", "if step < complete[0]:"),
    ],
    ("training/optimization.py", "training_optimization"): [
        ('self.weight_decay if weight.ndim > 1 and not name.endswith(".bias") else 0.0', "self.weight_decay"),
        ('and "modulation" not in name', ""),
        ("STACKED.get(name.split(\".\")[-2], 1) if is_matrix(name, weight) else 1", "1"),
    ],
    ("engine/optimizer.py", "engine_optimizer"): [
        ("0.2 * math.sqrt(max(", "0.2 * math.sqrt(min("),
        ("return gradient.lerp(buffer, momentum)", "return buffer"),
        ("torch.where(bad > 0, target, value)", "value"),
        ("result[rows.first : rows.first + rows.held]", "result[: rows.held]"),
    ],
    ("training/schedule.py", "training_schedule"): [
        ("(k - (steps - length)) / length", "k / steps"),
    ],
    ("flow/preference.py", "flow_preference"): [
        ("-self.beta / 2 * (winner - loser)", "-self.beta * (winner - loser)"),
        ("self.beta / 2 * (winner - loser)", "self.beta / 2 * (loser - winner)"),
        ("(1 + self.beta) * old - self.beta * ours", "(1 - self.beta) * old + self.beta * ours"),
        ("off.detach().abs()", "off.abs()"),
        ("drawn.worth * liked + (1 - drawn.worth) * disliked", "liked"),
        ("/ centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)", "/ 1.0"),
        ("descending=True, stable=True", "descending=False, stable=True"),
        ("(winner > loser).to", "(winner >= loser).to"),
        ("with torch.no_grad():\n        theirs", "if True:\n        theirs"),
    ],
    ("training/judged.py", "training_judged"): [
        ("own.covariance().trace() / first", "first.covariance().trace() / first"),
        ("self.first = TeacherModel(drawing, self.reference.pipe", "self.first = TeacherModel(drawing, pipe"),
        ("if key not in self.theirs:", "if not self.theirs:"),
        ("first = rows[:, :1, :1].expand(rows.shape)", "first = rows"),
        ("drawn_from = rows[:, 0].flatten()", "drawn_from = rows[:, -1].flatten()"),
        ("advice.order + offset", "advice.order"),
        ("x0[order.to(x0.device)], self.twins(fresh)", "x0[order.to(x0.device)], fresh"),
        ("model = judge.policy.guided(self.condition, judge.judgement.guidance * scale, model)", "pass"),
        ("self.pairs.evaluations(Objective()) / self.pairs.uses", "self.pairs.evaluations(Objective())"),
        ("if self.reference or base:", "if self.reference:"),
        ("return -reward.item()", "return reward.item()"),
    ],
    ("training/chosen.py", "training_chosen"): [
        ("torch.stack([lesson.x0, lesson.worse], 1)", "torch.stack([lesson.worse, lesson.x0], 1)"),
        ("Drawn(pictures, lesson.noise[rows],", "Drawn(pictures, lesson.noise.repeat(2, 1, 1, 1),"),
        ("t[rows]", "t.repeat(2)"),
        ("found.loss[::2]", "found.loss[: len(t)]"),
        ("learned=2", "learned=1"),
        ("frozen=2", "frozen=1"),
        ('return values["preference"]', 'return -values["preference"]'),
    ],
    ("training/prefer.py", "training_chosen"): [
        ("if len(files) >= least", "if files"),
        ("if unequal:", "if True:"),
    ],
    ("data/raw/choices.py", "training_chosen"): [
        ("self.path.read_bytes() + str(sizes)", "str(sizes)"),
        ('KEYS = ("caption", "better", "worse")', 'KEYS = ("caption", "worse", "better")'),
        ("shard * UNIT + start :", "shard * UNIT :"),
    ],
    ("data/store/samples.py", "training_chosen"): [
        ("x0, second[kind] = x0.float()", "second[kind], x0 = x0.float()"),
    ],
    ("data/store/samples.py", "data_hints"): [
        ("picture=second[HINT]", "picture=x0"),
    ],
    ("data/raw/base.py", "encode_crops"): [
        ("found.id + self.mark(number)", "found.id"),
        ("(number - 1 + u) / (self.crops - 1)", "(number + u) / self.crops"),
    ],
    ("data/store/encoding.py", "encode_crops"): [
        ("cover(image, *self.buckets.sizes[bucket], found.crop)", "cover(image, *self.buckets.sizes[bucket])"),
    ],
    ("data/text/tags.py", "data_tags"): [
        ("if chances[i] >= self.dropout", "if places[i] >= self.dropout"),
        ("(rest[i] for i in order", "(rest[i] for i in range(len(rest))"),
    ],
    ("data/store/samples.py", "data_tags"): [
        ("Use.TAGS, share.step, place)", "Use.TAGS, share.step)"),
    ],
    ("data/raw/beside.py", "data_masks"): [
        ("ImageOps.mirror(found) if raw.mirrored", "ImageOps.flip(found) if raw.mirrored"),
        ("if (own := size_of(file)) != size:", "if sorted(own := size_of(file)) != sorted(size):"),
    ],
    ("data/store/encoding.py", "data_masks"): [
        ("levels(cover(masks(found, size), *self.buckets.sizes[bucket], found.crop)[0])",
         "levels(masks(found, size).resize(self.buckets.sizes[bucket][::-1]))"),
    ],
    ("data/store/samples.py", "data_masks"): [
        ("shown + self.mask_floor * (1 - shown)", "shown + self.mask_floor"),
    ],
    ("training/generator.py", "data_masks"): [
        ("lesson.loss_mask = batch.loss_mask", "lesson.loss_mask = None"),
    ],
    ("flow/objective.py", "flow_loss_mask"): [
        ("y, t, loss_mask)\n\n    def point", "y, t)\n\n    def point"),
    ],
    ("flow/variance.py", "flow_loss_mask"): [
        ("v, t, loss_mask)", "v, t)"),
    ],
    ("data/raw/hints.py", "data_hints"): [
        ("self.sigma, self.low, self.high, mode", "self.sigma, self.low / 50, self.high / 50, mode"),
        ("GaussianBlur(self.radius)", "GaussianBlur(self.radius / 2)"),
        ("image.reduce(self.factor)", "image.reduce(self.factor // 2)"),
        ("ImageOps.mirror(found) if raw.mirrored else found", "found"),
        ("side - length + 1", "1"),
    ],
    ("mmdit/control.py", "mmdit_control"): [
        ("tokens.image + hinted", "tokens.image"),
        ("int(i / (depth / count))", "i // (depth // count)"),
        ("range(depth - 1)), None]", "range(depth))]"),
        ("residual if scale == 1 else scale * residual", "residual"),
        ("torch.zeros_like(condition.pooled)", "condition.pooled"),
        ("added[i] = scaled if sofar is None else sofar + scaled", "added[i] = scaled"),
        ("(low <= t) & (t <= high)", "(low <= t) | (t <= high)"),
        ("unused.requires_grad_(False)", "pass"),
        ("control.every_block = True", "control.every_block = False"),
        ("control.trunk.load_state_dict({name: state[name] for name in control.trunk.state_dict()})", "pass"),
        ('config.get("force_zeros_for_pooled_projection", True)', "False"),
    ],
    ("mmdit/model.py", "mmdit_control"): [
        ("image + residual.to(image.dtype)", "image - residual.to(image.dtype)"),
    ],
    ("pipeline/residual.py", "pipeline_residual"): [
        ("(x0 - self.mean) * self.scale", "(x0 - self.mean) / self.scale"),
        ("torch.zeros(size, device=device), torch.ones", "torch.randn(size, device=device), torch.ones"),
        ("self.mean + residual / self.scale", "self.mean + residual"),
        ("enabled=False", "enabled=True"),
    ],
    ("pipeline/__init__.py", "pipeline_residual"): [
        ("x0 = residual.of(self._encode(image, noise))", "x0 = self._encode(image, noise)"),
        ("report(0, z,", "callback(0, z,"),
        ("callback(done, z, residual.whole(x0))", "callback(done, z, x0)"),
    ],
    ("training/residual.py", "pipeline_residual training_residual"): [
        ("(count / squares) ** 0.5", "(squares / count) ** 0.5"),
        ("pictures += len(left)", "pictures += 1"),
    ],
    ("training/generator.py", "training_residual"): [
        ('numbers.get("residual_scale", regressor.scale)', "regressor.scale"),
        ("and regressor.measured:", "and True:"),
        ("residual.of(batch.x0), batch.noise)", "batch.x0, batch.noise)"),
    ],
    ("pipeline/__init__.py", "sample_control"): [
        ("self.codec.shift * self.codec.scale", "self.codec.shift"),
    ],
    ("pipeline/__init__.py", "sample_autoguidance"): [
        ("Weak(weak.network, scale - 1)", "Weak(weak.network, scale)"),
        ('if wrong := [name for name in fields', 'if wrong := [name for name in ("text_dim",)'),
    ],
    ("flow/guidance.py", "flow_gradients"): [
        ("estimate.x0 + (b**2 / a) * step", "estimate.x0 + (b / a) * step"),
        ("estimate.noise - b * step", "estimate.noise + b * step"),
        ("lambda z: score(z, t).sum()", "lambda z: score(z, t).mean()"),
        ("reward(denoise(z, t).x0)", "reward(denoise(z.detach(), t).x0)"),
        ("tensor(interval[1], dtype=torch.float64))[0] == 0", "tensor(interval[0], dtype=torch.float64))[0] == 0"),
        ("b / (a + b) <= BEFORE_NOISE", "t <= BEFORE_NOISE"),
    ],
    ("pipeline/prior.py", "pipeline_prior"): [
        ("(drawn * text).sum(-1).argmax(0)", "(drawn * text).sum(-1).argmin(0)"),
        ("(drawn * text).sum(-1).argmax(0)", "(drawn * text).sum(-1).mean(1).argmax().expand(len(text))"),
        ("first * noise(), noise, None) / last", "first * noise(), noise, None) / last + noise()"),
        ("latent, walk, times = pipe.plan(sampling)", "latent, walk, times = pipe.plan(pipe.sampling)"),
        ("pooled[:, slot.pooled].float()", "pooled[:, -wanted:].float()"),
    ],
    ("pipeline/gradients.py", "sample_gradients"): [
        ("float(b / (a + b))", "float(t)"),
        ("(z / (a + b)).float()", "z.float()"),
        ("if not _alike(reader.codec, pipe.codec.fingerprint()):", "if False:"),
        ("            reader.labels(prompts)\n", ""),
    ],
    ("pipeline/__init__.py", "sample_gradients"): [
        ("[negative] * len(prompts) if unconditional else prompts", "prompts"),
        ("pulls=(*self.guides.pulls, *pulls)", "pulls=self.guides.pulls"),
    ],
    ("pipeline/guidance.py", "pipeline"): [
        ("network.in_channels if isinstance(objective, LearnedVariance) else None", "None"),
    ],
    ("pipeline/guidance.py", "sample_autoguidance sample_guider"): [
        ("sampling.interval if free else NEVER", "sampling.interval"),
        ("sampling.guide(objective, times) if free", "None if free"),
    ],
    ("baselines/classifier.py", "sample_gradients"): [
        ("pattern.search(prompt.lower())", "pattern.match(prompt.lower())"),
        ("self.time(timestep_features(tau, TIME_FEATURES))", "self.time(timestep_features(0 * tau, TIME_FEATURES))"),
        (".log_softmax(1).gather(1, asked[:, None])", ".gather(1, asked[:, None])"),
    ],
    ("pipeline/steering.py", "sample_control"): [
        ("(i + 1) / steps <= last", "i / steps <= last"),
        ("first <= i / steps", "first < i / steps"),
    ],
    ("mmdit/control.py", "training_control"): [
        ("    base.requires_grad_(False)\n", ""),
    ],
    ("metrics/page.py", "metrics_page"): [
        ("found.setdefault(key, {})[step] = value", "found.setdefault(key, {}).setdefault(step, value)"),
        ("steps[losses.argmin()]", "steps[losses.argmax()]"),
        ("if np.ptp(run.values[key][1])", "if True"),
        ("if number == len(lines):", "if True:"),
        ("len(chosen) - 1, MOST_SHEETS", "len(chosen) // 2, MOST_SHEETS"),
    ],
    ("data/store/mixture.py", "data_mixture"): [
        ("() if i else apart", "apart"),
        ("1 if within else self.repeats[i]", "self.repeats[0]"),
        ("often[part] * len(own)", "often[part]"),
        ("choice[where]", "choice[: len(own)]"),
        ("[torch.cat(tensors)[back]", "[torch.cat(tensors)"),
        ('side="right"', 'side="left"'),
    ],
    ("data/store/samples.py", "data_mixture"): [
        ("found._replace(step=share.step)", "found"),
    ],
    ("training/judged.py", "training_finetune"): [
        ("        data.judged = True\n", ""),
    ],
    ("training/generator.py", "training_judged"): [
        ("self.judge.follow(self.pipeline,", "self.judge.follow(Pipeline(self.network, *self.pipeline.parts[1:]),"),
        ("normal(self.run.seed, use, step,", "normal(self.run.seed, use, 0,"),
        ("u = self.judge.twins(u, 1)", "pass"),
        ("self.judge.watched.clear()", "pass"),
        ("score = self.judge.score(judged, int(sums[-1]))", "score = mean"),
    ],
    ("training/rewards.py", "training_rewards"): [
        ("found + reward.weight * own", "found + own"),
        ("if not own.isfinite().all():", "if own.isnan().all():"),
        ("except ValueError as error:", "except KeyError as error:"),
        ("softmax(1)", "sigmoid()"),
    ],
    ("data/shapes.py", "data_shapes"): [
        ("box[0].start + (rows[0] + rows[-1]) / 2", "(rows[0] + rows[-1]) / 2"),
        ("pixels[box][filled], centre", "pixels[filled], centre"),
    ],
    ("benchmarks/dreambooth.py", "benchmarks_dreambooth"): [
        ("return found == [ROOF, BODY]", "return found[0] == ROOF"),
        ("BATCH * len(mixed)", "BATCH"),
        ("PRESERVED // len(LEARNED)", "PRESERVED"),
    ],
    ("data/shapes.py", "training_rewards"): [
        ("joined if joined in RELATIONS else None", "None"),
        ("(sum(parts) / len(parts) + fulfils(found, asked)) / 2", "sum(parts) / len(parts)"),
    ],
    ("training/terms.py", "terms"): [
        ("tokens[self.strong].detach()", "tokens[self.strong]"),
        ("(1 - similarity.mean(1))", "(1 - similarity.abs().mean(1))"),
    ],
    ("training/teacher.py", "training_students training_teacher"): [
        ("low + (high - low) * u", "low + high * u"),
        ("calls = 1.0 if self.range == (1, 1) or", "calls = 1.0 if True or"),
        ("frozen=walked", "frozen=0"),
        ("teacher.guided(self.condition, scale), teacher.critic,", "teacher.critic, teacher.critic,"),
        ("condition.pooled[:, -SIZE_FEATURES:]], 1)", "condition.pooled[:, -SIZE_FEATURES:] * 0], 1)"),
    ],
    ("training/teacher.py", "training_pairs"): [
        ("evaluations(process) / self.pairs.uses", "evaluations(process)"),
        ("drawn[rows], noise[firsts]", "drawn[rows], noise"),
        ("None if part is None else part[firsts] for part in told", "part for part in told"),
        ("scale[::uses])", "scale[: len(first.pooled)])"),
        ("condition = condition._replace(guidance=scale)", "condition = condition._replace(guidance=1 + 0 * scale)"),
        ("objective.alpha(noise[0, 0].numel())", "1.0"),
    ],
    ("training/teacher.py", "training_finetune"): [
        ("lora.off(self.pipe.network) if self.bare", "nullcontext() if self.bare"),
        ("network, process = student, process_of(Path(base))[0]", "network, process = student, objective"),
    ],
    ("mmdit/lora.py", "training_finetune"): [
        ("layer.enable_adapters(True)", "pass"),
    ],
    ("pipeline/folder.py", "training_finetune"): [
        ("parts = parts._replace(objective=process[0], sampling=process[1])", "pass"),
        ("{} if own == describe_process(", "{} if False and own == describe_process("),
    ],
    ("pipeline/__main__.py", "training_finetune"): [
        ("if key == lora.PROCESS}", "if key != lora.PROCESS}"),
    ],
    ("training/generator.py", "training_students"): [
        ("for own in self.weights]", "for own in self.weights[:1]]"),
        ("if score < self.best or self.critic:", "if score < self.best:"),
        ("self.fresh(batch, Use.MATCHED)", "batch.noise"),
        ("return own | {CRITIC + name", "return own or {CRITIC + name"),
    ],
    ("training/generator.py", "training_pairs"): [
        ("self.teacher.uses if self.teacher else 1)", "1)"),
    ],
    ("training/generator.py", "training_generator"): [
        ("lesson.loss(self.objective, self.ema.main, t)", "lesson.loss(self.objective, self.network, t)"),
        ("stream(self.run.seed, Use.TIME, batch.step)", "stream(self.run.seed, Use.TIME)"),
        ("[:, batch.positions]", "[:, : len(batch.positions)]"),
        ("dtype=torch.float32) + 0.5) / VALIDATION_TIMES", "dtype=torch.float32)) / VALIDATION_TIMES"),
        ("self.sums[-1] += counted * len(batch.x0)", "self.sums[-1] += len(batch.x0)"),
        ('numbers["best"] if there and numbers["best"] is not None else math.inf', "math.inf"),
        ("if score < self.best or", "if score != self.best or"),
        ("scheduler.set(self.global_step if step is None", "scheduler.set(0 if step is None"),
    ],
    ("training/generator.py", "training_optimization"): [
        ("clip_grad_norm_(own, self.optimization.clip)", "clip_grad_norm_(own, math.inf)"),
    ],
    ("training/generator.py", "train"): [
        ("self.ema.update(self.network, self.global_step + 1)", "self.ema.update(self.network, self.global_step)"),
    ],
    ("training/generator.py", "engine_resume"): [
        ("means / self.strategy.accumulate_grad_batches", "means"),
    ],
    ("training/optimization.py", "training_schedule"): [
        ("(k - self.warmup, steps - self.warmup)", "(k - self.warmup, steps)"),
        ("done <= other and all(", "all("),
    ],
    ("benchmarks/footprint.py", "benchmarks_plan_networks"): [
        ("sum(map(frozen_bytes, job.others))", "0.0"),
        ("(*frozen, *module.buffers())", "frozen"),
        ("activations + kept - once", "activations"),
        ("self.trained + sum(map(trained_of, self.others))", "self.trained"),
    ],
    ("benchmarks/plan.py", "benchmarks_plan_networks"): [
        ("copy.deepcopy(own).float() if", "own if"),
        ("        network.requires_grad_(False)\n    return", "        pass\n    return"),
    ],
    ("training/roles.py", "training_cost"): [
        ("self.learned * training_flops(", "self.learned * forward_flops("),
    ],
    ("engine/flops.py", "engine_meter"): [
        (".requires_grad_(leaf.requires_grad)", ".requires_grad_(True)"),
    ],
    ("training/cost.py", "training_cost"): [
        ("learning is None or name in learning", "True"),
        (".requires_grad_(self.reads)", ""),
        ("// self.network.unit**2", "// self.network.unit"),
    ],
    ("metrics/distance.py", "metrics_measure"): [
        ("len(group) * (len(group) - 1)", "len(group) ** 2"),
        ("columns[nearest]).norm(dim=1)", "columns[nearest]).square().sum(dim=1)"),
        ("pooled[inverse.cpu()], labels", "pooled, labels[: len(pooled)]"),
    ],
    ("metrics/distribution.py", "metrics_distribution"): [
        ("- 2 * root", "- root"),
        ("/ (self.number - 1)", "/ self.number"),
        ("/ (len(x) * (len(x) - 1))", "/ len(x) ** 2"),
        (" - torch.tensor(len(logits), dtype=logits.dtype).log()", ""),
        ("return covered_share(features, reference, k), covered_share(reference, features, k)",
         "return covered_share(reference, features, k), covered_share(features, reference, k)"),
    ],
    ("metrics/straightness.py", "metrics_straightness"): [
        ("/ (tau[-1] - tau[0])", "/ (tau[0] - tau[-1])"),
        ("step.abs() * norms", "norms"),
    ],
    ("metrics/clip_score.py", "metrics_clip"): [
        ("cosine.clamp(min=0).mean()", "cosine.mean().clamp(min=0)"),
    ],
    ("metrics/features.py", "metrics_clip metrics_judge"): [
        ("pictures.mul(255).round()", "pictures.mul(255)"),
        ("maps[:, : self.channels]", "maps[:, -self.channels :]"),
    ],
    ("metrics/table.py", "report"): [
        ('{"low": min, "high": max}', '{"low": max, "high": min}'),
        ("abs(value) >= 999.5", "value >= 999.5"),
        ("if len({shown(key, value) for value in group.values()}) > 1:", "if len(group) > 1:"),
    ],
    ("metrics/ranking.py", "study_document"): [
        (" and any(a < b for a, b in zip(one, other, strict=True))", ""),
    ],
    ("flow/guidance.py", "sample_refiner"): [
        ("denoise if t >= handover else refine", "denoise if t < handover else refine"),
    ],
    ("pipeline/__init__.py", "sample_refiner"): [
        ("late = refiner.pipe.denoiser(", "late = self.denoiser("),
        ("(times[:-1] < handover).any()", "(times < handover).any()"),
        ('({**p.codec.fingerprint(), "dtype": None} for p in (self, other))', '("", "")'),
    ],
    ("pipeline/__init__.py", "data_sizes"): [
        ("self.condition([negative], height, width)", "self.condition([negative])"),
        ("torch.tensor([h, w, 0, 0, h, w])", "torch.tensor([w, h, 0, 0, w, h])"),
    ],
    ("pipeline/__init__.py", "pipeline"): [
        ("residual.whole(z / self.scale_at(times[-1]))", "residual.whole(z)"),
        ("return a if t == 0 else (a**2 + b**2).sqrt()", "return a if t == 0 else a + b"),
        ("z = self.scale_at(times[0]) * noise", "z = noise"),
    ],
    ("pipeline/__init__.py", "fewstep_pipeline"): [
        ("walk(denoise, first * z,", "walk(denoise, z,"),
    ],
    ("pipeline/sampling.py", "pipeline_sampling"): [
        ("int(self.steps - self.steps * strength)", "round(self.steps - self.steps * strength)"),
        ("if first < i < last]", "if first <= i <= last]"),
        ("generator=draw) for draw in draws", "generator=draws[0]) for draw in draws"),
    ],
    ("pipeline/pairs.py", "pipeline_pairs"): [
        (".bfloat16().float()", ""),
        ("(start, ended) if inverted else (ended, start)", "(ended, start)"),
        ("numbers >= self.how.num - self.how.inverted", "numbers < self.how.inverted"),
    ],
    ("pipeline/times.py", "flow_search"): [
        ("self._recorded(range(half, num), bar)", "self._recorded(range(half), bar)"),
    ],
    ("tokens/quantize.py", "tokens_quantize"): [
        ("codebook.square().sum(1) - 2 * rows", "codebook.square().sum(1) - rows"),
        ("rest, total = rest - vector, total + vector", "rest, total = rest + vector, total + vector"),
        ("through = rows + (total - rows).detach()", "through = total.detach() + 0 * rows"),
        ("errors.append((rows - total)", "errors.append((rest.detach() - total)"),
        ("self.counts.lerp_(counts, 1 - self.decay)", "self.counts.lerp_(counts, self.decay)"),
        ("(total + len(self.counts) * self.epsilon) * total", "(total + self.epsilon) * total"),
        ("if self.training:", "if True:"),
        ("torch.autocast(features.device.type, enabled=False)", "torch.autocast(features.device.type, enabled=True)"),
        ("torch.stack(inputs, 1).flatten(0, 1), torch.stack(codes, 1)",
         "torch.stack(inputs).flatten(0, 1), torch.stack(codes)"),
        ("            dist.all_reduce(counts)\n", ""),
        ("            dist.all_reduce(sums)\n", ""),
        ("            dist.all_reduce(fresh)\n", ""),
        ("self.codebook[dead], self.sums[dead] = fresh, fresh", "self.codebook[dead] = fresh"),
        ("(self.counts < self.restart)", "(self.counts > self.restart)"),
        ('register_buffer("codebook", torch.randn(codes, dim))', 'codebook = nn.Parameter(torch.randn(codes, dim))'),
        ("<= int(codes.max()) < len", "<= int(codes.max()) <= len"),
    ],
    ("tokens/vqvae.py", "tokens_vqvae"): [
        ("b (p q) h w\", p=2, q=2)], dim=1)", "b (q p) h w\", p=2, q=2)], dim=1)"),
        ("return Reconstruction(self.decoder(torch.cat([enlarged, vectors], dim=1)), packed, commitment + second)",
         "return Reconstruction(self.decoder(torch.cat([vectors, enlarged], dim=1)), packed, commitment + second)"),
    ],
    ("tokens/codec.py", "tokens_vqvae"): [
        ("or codes.max() >= vocabulary", "or codes.max() > vocabulary"),
        ("not torch.equal(codes.to(latents), latents) or", ""),
        ("latents / self.scale + self.shift", "latents / self.scale - self.shift"),
        ("return VQ(folder, read_latents(folder)[2])", "return VQ(folder)"),
        ("(pixels * (self.vocabulary - 1))", "(pixels * self.vocabulary)"),
        ('config |= {"shift_factor": self.shift, "scaling_factor": self.scale}', "config |= {}"),
    ],
    ("tokens/process.py", "tokens_process"): [
        ("condition.text[:, 1:, 0]", "condition.text[:, :-1, 0]"),
        ("self.text_weight * spoken + (1 - self.text_weight)", "(1 - self.text_weight) * spoken + self.text_weight"),
        ("z, written = z.clone(), torch.zeros_like(z)", "written = torch.zeros_like(z)"),
        ("round((1 - float(t)) * count)", "round(float(t) * count)"),
        ("torch.tensor(1 - number / count", "torch.tensor(1 - first / count"),
        ("ordered.cumsum(1) - ordered < share", "ordered.cumsum(1) < share"),
        ("torch.where(kept, ordered, 0.0)", "ordered"),
        ("(here.double() / temperature)", "(here.double() * temperature)"),
        ("probabilities.sort(1, descending=True)", "probabilities.sort(1)"),
        ("callback(i, z, written.clone())", "callback(i, z, written)"),
        ("(u * sums[:, -1])[:, None], right=True", "(u * sums[:, -1])[:, None], right=False"),
    ],
    ("tokens/dalle.py", "tokens_dalle"): [
        ("self._codes(stream[:, :-1].long(), 0)", "self._codes(stream[:, 1:].long(), 0)"),
        ("first = self.text_length - 1", "first = self.text_length - 2"),
        ('"b k h w -> b (h w k)"', '"b k h w -> b (k h w)"'),
        ("and version == self.version", ""),
        ("and torch.equal(self.text, text)", ""),
        ("and torch.equal(self.codes, codes[:, :count])", ""),
        ("codes[:, count - 1 :], count - 1)", "codes[:, count - 1 :], count)"),
        ("[first : first + codes.shape[1]]", "[: codes.shape[1]]"),
        ("place, depth = divmod(count, self.in_channels)", "depth, place = divmod(count, self.sample_size**2)"),
        ("torch.where(condition.mask[..., None], words", "torch.where(condition.mask[..., None] | True, words"),
        ("embed_tokens(codes + self.words)", "embed_tokens(codes)"),
        ("cache.get_seq_length() if cache is not None else 0", "0"),
    ],
    ("pipeline/likelihood.py", "tokens_training"): [
        ("bits_per_dimension(-nats.double()", "bits_per_dimension(nats.double()"),
    ],
    ("pipeline/guidance.py", "tokens_training"): [
        ("isinstance(objective, LearnedVariance) else None", "objective.outputs > 1 else None"),
    ],
    ("engine/strategy.py", "tokens_dalle"): [
        ("context_fn=context, **named)", "context_fn=context)"),
    ],
    ("studies/measure.py", "evaluate"): [
        ("calls += len(inputs[0])", "calls += 1"),
        ("(z / scale[done]).cpu()", "z.cpu()"),
        ('"train" if reference == "held_out" else "held_out"', '"held_out" if reference == "held_out" else "train"'),
    ],
    ("studies/categories.py", "categories"): [
        ("torch.where(right[:, None], torch.tensor(GREEN), torch.tensor(RED))",
         "torch.where(right[:, None], torch.tensor(RED), torch.tensor(GREEN))"),
    ],
    ("metrics/significance.py", "metrics_significance"): [
        ("statistics.stdev(values)", "statistics.pstdev(values)"),
    ],
    ("studies/recipes.py", "compare"): [
        ("min(rates, key=lambda rate: rates[rate])", "max(rates, key=lambda rate: rates[rate])"),
        ("math.inf if found is None else found", "0.0 if found is None else found"),
    ],
    ("storage/weights.py", "storage_weights storage_float8"): [
        ("return stored.float() * (", "return stored.float() / ("),
        ("scale.reshape(()) if scale.numel() == 1 else scale)", "scale.reshape(-1))"),
        ("_unwrapped(_decoded(whole))", "_unwrapped(whole)"),
    ],
    ("storage/float8.py", "storage_float8"): [
        ("dtype in EIGHT and name not in of and", "dtype in EIGHT[:0] and name not in of and"),
        ("layer for layer, kind in formats.items() if kind not in FORMATS", "layer for layer in ()"),
        ("(*UNUSED, FORMAT)", "UNUSED"),
    ],
    ("pipeline/comfy.py", "pipeline_comfy"): [
        ('return "normal"', 'return "sgm_uniform"'),
        ("TIMES % sampling.steps == 0", "TIMES % sampling.steps >= 0"),
        ("1 - times / (shift - (shift - 1) * times)", "1 - times"),
        ("(inside[0], inside[-1] + 1)", "(inside[0], inside[-1])"),
        ('"strength_model": update.strength', '"strength_model": 1.0'),
        ("None if image else scheduler(", "scheduler("),
    ],
}  # fmt: skip


class Fault(NamedTuple):
    """A mistake in a file of the project, and the tests that should see it."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def key(self) -> str:
        """A hash of everything that its result depends on, except the rest of the project."""
        parts = [json.dumps(self), *((ROOT / name).read_text() for name in (self.file, *self.tests))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def faults() -> list[Fault]:
    """All faults."""
    return [
        Fault(file, old, new, tuple(f"tests/test_{name}.py" for name in tests.split()))
        for (file, tests), pairs in FAULTS.items()
        for old, new in pairs
    ]


def copied(target: Path) -> None:
    """Copies the project's files, without what git ignores."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def write(file: Path, text: str) -> None:
    """Writes a file and makes it a second younger, or Python would take one of equal size for the one before."""
    after = file.stat().st_mtime + 1
    file.write_text(text)
    os.utime(file, (after, after))


def first_failure(tree: Path, tests: Sequence[str], log: Path) -> str | None:
    """Runs tests in a process of their own until one fails. The name of that test; None if all pass.

    The process is a fork of this one, which has imported the large libraries already.
    """
    report = log.with_suffix(".failed")
    report.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        _run(tree, tests, log, report)
    until, status = time.monotonic() + LIMIT, None
    while status is None and time.monotonic() < until:
        ended, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
        time.sleep(0.05)
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return f"no end within {LIMIT} s"
    if status == 0:
        return None
    return report.read_text() if report.exists() else f"status {status}"


def _run(tree: Path, tests: Sequence[str], log: Path, report: Path) -> None:
    import pytest

    class Reporter:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed and not failed:
                failed.append(report.nodeid)

    failed: list[str] = []
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(stream, number)
    os.chdir(tree)
    sys.path[0] = str(tree)  # in place of the folder of this script
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *tests], plugins=[Reporter()])
    sys.stdout.flush()
    if failed:
        report.write_text(failed[0])
    os._exit(int(status))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--count", type=int, help="number of faults, drawn at random; all by default")
    p.add_argument("--seed", type=int, default=0, help="of the draw")
    p.add_argument("--only", nargs="*", help="files whose faults are planted")
    p.add_argument("--out", type=Path, default=ROOT / "runs/planted.jsonl", help="file of the results")
    args = p.parse_args()
    chosen = [fault for fault in faults() if not args.only or fault.file in args.only]
    chosen = random.Random(args.seed).sample(chosen, min(len(chosen), args.count or len(chosen)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    known = {line["key"]: line["seen"] for line in map(json.loads, lines)}

    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    os.environ.pop("PYTHONPATH", None)
    for name in IMPORTED:
        importlib.import_module(name)

    with tempfile.TemporaryDirectory() as place:
        tree, log = Path(place) / "tree", Path(place) / "log"
        copied(tree)
        sound: dict[tuple[str, ...], bool] = {}
        for i, fault in enumerate(chosen, start=1):
            key = fault.key()
            if key not in known:
                if fault.tests not in sound and (failed := first_failure(tree, fault.tests, log)):
                    sys.exit(f"error: {failed} fails without a fault: mend it first\n{log.read_text()[-2000:]}")
                sound[fault.tests] = True
                file = tree / fault.file
                text = file.read_text()
                if text.count(fault.old) != 1:
                    sys.exit(f"error: {fault.file} holds {fault.old!r} {text.count(fault.old)} times: mend the list")
                write(file, text.replace(fault.old, fault.new))
                known[key] = first_failure(tree, fault.tests, log)
                write(file, text)
                with args.out.open("a") as out:
                    print(json.dumps({"key": key, "seen": known[key], **fault._asdict()}), file=out)
            shown = f"seen by {known[key]}" if known[key] else "NOT SEEN"
            print(f"{i}/{len(chosen)} {fault.file}: {fault.old.strip()!r} → {fault.new.strip()!r}: {shown}", flush=True)
    unseen = [fault for fault in chosen if not known[fault.key()]]
    print(f"{len(chosen)} faults planted, {len(chosen) - len(unseen)} seen, {len(unseen)} not seen")
    sys.exit(bool(unseen))


if __name__ == "__main__":
    main()
