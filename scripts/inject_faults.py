"""Checks the tests: puts one fault after another into a copy of the package and runs them there.

``python scripts/inject_faults.py [WORD]`` prints which faults the tests catch (only those whose
description contains WORD), and ends with 1 if one survives. The recorded trajectories are left
out: they notice any change, and say nothing about what is right.
"""

import importlib
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

import text_faults

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("configs", "diffdistill", "pipelines", "pyproject.toml", "rewards", "tests")
IMPORTED = ("torch", "peft", "pydantic", "yaml")
WORKERS = 2

TESTS = {
    "diffdistill/adapters.py": "test_adapters.py",
    "diffdistill/catalog.py": "test_catalog.py",
    "diffdistill/controllers.py": "test_controllers.py",
    "diffdistill/config.py": "test_config.py",
    "diffdistill/config_files.py": "test_config.py",
    "diffdistill/divergences.py": "test_divergences.py",
    "diffdistill/draws.py": "test_draws.py",
    "diffdistill/methods/causal_init.py": "test_method_causal_init.py",
    "diffdistill/methods/d_opsd.py": "test_method_d_opsd.py",
    "diffdistill/methods/dmd.py": "test_method_dmd.py",
    "diffdistill/methods/off_policy.py": "test_method_off_policy.py",
    "diffdistill/methods/self_forcing.py": "test_method_self_forcing.py",
    "diffdistill/methods/sft.py": "test_method_sft.py",
    "diffdistill/methods/stream_r1.py": "test_method_stream_r1.py",
    "diffdistill/options.py": "test_config.py",
    "diffdistill/readouts.py": "test_readouts.py",
    "diffdistill/role_building.py": "test_roles.py",
    "diffdistill/role_settings.py": "test_roles.py",
    "diffdistill/roles.py": "test_roles.py",
    "diffdistill/saliency.py": "test_saliency.py test_method_stream_r1.py",
    "diffdistill/schedules.py": "test_schedules.py",
    "diffdistill/weights.py": "test_weights.py test_method_stream_r1.py",
    "pipelines/flow.py": "test_method_d_opsd.py test_method_dmd.py",
    "pipelines/streaming.py": "test_streaming.py",
    "pipelines/wan_decoding.py": "test_method_self_forcing.py",
    "pipelines/wan_streaming.py": "test_method_self_forcing.py",
    **text_faults.TESTS,
}


class Fault(NamedTuple):
    """A mistake someone could make: ``old`` stands once in ``file``, and becomes ``new``."""

    what: str
    file: str
    old: str
    new: str


FAULTS = [
    Fault(
        "DMD's direction from real to fake",
        "diffdistill/divergences.py",
        "(fake - real) / scale",
        "(real - fake) / scale",
    ),
    Fault(
        "DMD's normalizer over the batch",
        "diffdistill/divergences.py",
        'range(1 if normalizer == "sample" else 0, sample.ndim)',
        "range(0, sample.ndim)",
    ),
    Fault(
        "DMD's infinite direction kept",
        "diffdistill/divergences.py",
        "nan=0.0, posinf=0.0, neginf=0.0",
        "nan=0.0",
    ),
    Fault(
        "teacher not detached in the divergence",
        "diffdistill/divergences.py",
        "(student.float() - teacher.detach().float()).square()",
        "(student.float() - teacher.float()).square()",
    ),
    Fault(
        "weight in the denominator",
        "diffdistill/divergences.py",
        "        return error.mean()\n",
        "        return error.mean() if weight is None else "
        "error.sum() / weight.expand_as(error).sum()\n",
    ),
    Fault(
        "mask counted before it is broadcast",
        "diffdistill/divergences.py",
        "    mask = mask.expand_as(error)\n",
        "",
    ),
    Fault(
        "clean sample on the wrong side",
        "diffdistill/readouts.py",
        "state.x - per_sample",
        "state.x + per_sample",
    ),
    Fault(
        "guidance ignored",
        "diffdistill/readouts.py",
        "clean_of(state, guided(positive, model(state, negative), scale, form))",
        "clean_of(state, positive)",
    ),
    Fault(
        "extra guidance taken for standard",
        "diffdistill/readouts.py",
        "else scale + 1.0",
        "else scale",
    ),
    Fault("sigma not squared", "diffdistill/weights.py", "t.square()", "t"),
    Fault(
        "noise level clamped before it is shifted",
        "diffdistill/schedules.py",
        "shifted(uniform, shift).clamp(low, high)",
        "shifted(uniform.clamp(low, high), shift)",
    ),
    Fault(
        "warm-up that starts at zero",
        "diffdistill/schedules.py",
        "(update + 1) / (warmup + 1)",
        "update / (warmup + 1)",
    ),
    Fault(
        "noise that depends on the place in the batch",
        "diffdistill/draws.py",
        "torch.randn(tuple(shape), generator=self.generator(purpose, number))\n"
        "            for number in ids.tolist()",
        "torch.randn(tuple(shape), generator=self.generator(purpose, number))\n"
        "            for number in range(len(ids))",
    ),
    Fault(
        "one stream for all purposes",
        "diffdistill/draws.py",
        'f"{self.seed}/{purpose}/{number}"',
        'f"{self.seed}/{number}"',
    ),
    Fault(
        "exposure ignored",
        "diffdistill/methods/d_opsd.py",
        "exposure=self.exposure",
        "exposure=1.0",
    ),
    Fault(
        "teacher asked with gradients on",
        "diffdistill/methods/d_opsd.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ),
    Fault(
        "student shown the target",
        "diffdistill/methods/d_opsd.py",
        "walk(self.student, prompt, noise",
        "walk(self.student, prompt_and_target, noise",
    ),
    Fault(
        "count dropped",
        "diffdistill/methods/d_opsd.py",
        "                count=len(noise),\n",
        "",
    ),
    Fault(
        "no loss is ever the last",
        "diffdistill/methods/d_opsd.py",
        "more=index + 1 <",
        "more=index <",
    ),
    Fault(
        "student's walk in place of the teacher's",
        "diffdistill/methods/off_policy.py",
        "walk(self.teacher, shown",
        "walk(self.student, shown",
    ),
    Fault(
        "off-policy weight dropped",
        "diffdistill/methods/off_policy.py",
        "masked_mean(error, weight=weight)",
        "masked_mean(error)",
    ),
    Fault(
        "flow matching towards noise",
        "diffdistill/methods/sft.py",
        "mse(velocity, noise - clean)",
        "mse(velocity, clean - noise)",
    ),
    Fault(
        "shift of training times ignored",
        "diffdistill/methods/sft.py",
        "shifted(t, self.shift)",
        "t",
    ),
    Fault(
        "critic's target with the wrong sign",
        "diffdistill/methods/dmd.py",
        "noise - sample))",
        "sample - noise))",
    ),
    Fault(
        "critic's loss reaches the student",
        "diffdistill/methods/dmd.py",
        "yield self._critic_loss(batch, prompt, sample.detach())\n",
        "yield self._critic_loss(batch, prompt, sample)\n",
    ),
    Fault(
        "adversarial term leaves gradient in the critic",
        "diffdistill/methods/dmd.py",
        "(gradient,) = torch.autograd.grad(value, leaf)",
        "value.backward()\n            gradient = leaf.grad",
    ),
    Fault(
        "student made less real",
        "diffdistill/methods/dmd.py",
        "softplus(-self.critic.discriminate(state, prompt))",
        "softplus(self.critic.discriminate(state, prompt))",
    ),
    Fault(
        "adversarial weight of the critic ignored",
        "diffdistill/methods/dmd.py",
        "self.gan_critic_weight * telling",
        "self.gan_weight * telling",
    ),
    Fault(
        "alternating turns ignored",
        "diffdistill/methods/dmd.py",
        'if not train_student or self.ratio == "every-step":',
        "if True:",
    ),
    Fault(
        "random exit ignored",
        "diffdistill/methods/dmd.py",
        'if self.exit == "random":',
        'if self.exit == "never":',
    ),
    Fault(
        "guidance against the prompt itself",
        "diffdistill/methods/dmd.py",
        "self.family.condition(batch, negative=True)",
        "self.family.condition(batch)",
    ),
    Fault(
        "decay of the average swapped",
        "diffdistill/roles.py",
        "1.0 - role.settings.decay",
        "role.settings.decay",
    ),
    Fault(
        "average that moves with any role",
        "diffdistill/roles.py",
        " and role.settings.of == updated",
        "",
    ),
    Fault(
        "average that does not start as a copy",
        "diffdistill/role_building.py",
        "    copy_parameters(source, role)\n    return role",
        "    return role",
    ),
    Fault(
        "average of a full network that is the network itself",
        "diffdistill/role_building.py",
        "network = copy.deepcopy(source.network)",
        "network = source.network",
    ),
    Fault(
        "full fine-tuning of the shared base",
        "diffdistill/role_building.py",
        "return copy.deepcopy(network)",
        "return network",
    ),
    Fault(
        "bases copied with the adapters of others",
        "diffdistill/role_building.py",
        'return {"none": 0, "lora": 1, "shadow": 3}[adapter]',
        "return 0",
    ),
    Fault(
        "recomputation under whatever adapter is active",
        "diffdistill/roles.py",
        "with active(layers, name):",
        "with active([], name):",
    ),
    Fault(
        "following a role that is not trained",
        "diffdistill/role_settings.py",
        'followed is None or followed.weights != "trained"',
        "followed is None",
    ),
    Fault(
        "adapter not put back after an error",
        "diffdistill/adapters.py",
        "    try:\n        yield\n    finally:\n        for",
        "    yield\n    if True:\n        for",
    ),
    Fault(
        "switching adapters with peft's own function",
        "diffdistill/adapters.py",
        "layer._active_adapter = [] if name is None else [name]",
        "layer.set_adapter([] if name is None else [name])",
    ),
    Fault(
        "targets that match parts of names",
        "diffdistill/adapters.py",
        'matched = [n for n in linear if any(f".{n}".endswith(f".{t}") for t in targets)]',
        "matched = [n for n in linear if any(t in n for t in targets)]",
    ),
    Fault(
        "walk away from the data",
        "pipelines/flow.py",
        "state.x + (after - now) * velocity",
        "state.x + (now - after) * velocity",
    ),
    Fault(
        "walk that keeps its graph",
        "pipelines/flow.py",
        "            with torch.no_grad():\n                x = self.advance(",
        "            x = x + (grid[index + 1] - grid[index]) * velocity\n"
        "            if renoise is not None:\n                x = self.advance(",
    ),
    Fault(
        "re-noising at the wrong level",
        "pipelines/flow.py",
        "(1.0 - after) * clean + after * renoise(index)",
        "(1.0 - now) * clean + now * renoise(index)",
    ),
    Fault("unknown keys ignored", "diffdistill/options.py", 'extra="forbid"', 'extra="ignore"'),
    Fault(
        "only the first override used",
        "diffdistill/config_files.py",
        "for override in overrides:",
        "for override in overrides[:1]:",
    ),
    Fault(
        "defaults of a method win over the config",
        "diffdistill/config.py",
        "{**default, **section_of(given.get(name), where)}",
        "{**section_of(given.get(name), where), **default}",
    ),
    Fault(
        "names of other packages ignored",
        "diffdistill/catalog.py",
        "{point.name: point.value for point in found} | TABLES[kind]",
        "TABLES[kind]",
    ),
    Fault(
        "cached keys not detached",
        "pipelines/streaming.py",
        "KeysValues(keys.detach(), value.detach())",
        "KeysValues(keys, value)",
    ),
    Fault(
        "cached keys turned twice",
        "pipelines/streaming.py",
        "keys = key if rotary_emb.past_cos is None else raw",
        "keys = key",
    ),
    Fault(
        "the window forgets the sink",
        "pipelines/streaming.py",
        "        return self.sunk + self.recent",
        "        return self.recent",
    ),
    Fault(
        "the sink is not part of the window",
        "pipelines/streaming.py",
        "self.window - coming - sum(part.num_frames for part in self.sunk)",
        "self.window - coming",
    ),
    Fault(
        "a block sees the one after it",
        "pipelines/streaming.py",
        "*range(start, start + block)))",
        "*range(start, min(start + 2 * block, num_frames))))",
    ),
    Fault(
        "teacher forcing sees its own clean block",
        "pipelines/streaming.py",
        "f + num_frames if group.start <= f < group.stop else f",
        "f",
    ),
    Fault(
        "the EMA sink decays the wrong way",
        "pipelines/streaming.py",
        "own.keys.lerp(other.keys, 1.0 - decay)",
        "own.keys.lerp(other.keys, decay)",
    ),
    Fault(
        "blocks begin where the stream began",
        "pipelines/streaming.py",
        "positions = tuple(range(cache.start, cache.start + num_frames))",
        "positions = tuple(range(num_frames))",
    ),
    Fault(
        "the decoder forgets between blocks",
        "pipelines/wan_decoding.py",
        "            self.begun = True\n",
        "",
    ),
    Fault(
        "the noised block is cached",
        "pipelines/wan_streaming.py",
        "state = State(clip, _level(clip, 0.0))",
        "state = State(clip, _level(clip, 0.5))",
    ),
    Fault(
        "a graph of every call",
        "pipelines/wan_streaming.py",
        "torch.set_grad_enabled(graph_from is not None and index >= graph_from)",
        "torch.set_grad_enabled(True)",
    ),
    Fault(
        "the prompt switch keeps the old past",
        "pipelines/wan_streaming.py",
        "past, told = sampler.retold(condition, past), condition",
        "told = condition",
    ),
    Fault(
        "blocks weigh as much as the whole",
        "diffdistill/methods/self_forcing.py",
        "len(again) / len(starts)",
        "len(again)",
    ),
    Fault(
        "the goal of another block",
        "diffdistill/methods/self_forcing.py",
        "part = goal.frames(start - scored.first, start - scored.first + block)",
        "part = goal.frames(0, block)",
    ),
    Fault(
        "the beginning of a long stream is scored",
        "diffdistill/methods/self_forcing.py",
        "first = stream.shape[2] - clip",
        "first = 0",
    ),
    Fault(
        "the first block of a long stream is learned from",
        "diffdistill/methods/self_forcing.py",
        "skipped = self.family.block_frames if self.reencode and frames > clip else 0",
        "skipped = 0",
    ),
    Fault(
        "the reliability's sign",
        "diffdistill/weights.py",
        "torch.exp(beta * score)",
        "torch.exp(-beta * score)",
    ),
    Fault(
        "more saliency for the stronger axis",
        "diffdistill/weights.py",
        "torch.softmax(-scores / temperature, dim=-1)",
        "torch.softmax(scores / temperature, dim=-1)",
    ),
    Fault(
        "weights of time not of mean one",
        "diffdistill/saliency.py",
        "    return weight / weight.mean(dim=1, keepdim=True)",
        "    return weight",
    ),
    Fault(
        "saliency stretched over the batch",
        "diffdistill/saliency.py",
        "places = stretched(saliency, (2, 3))",
        "places = stretched(saliency, (0, 1, 2, 3))",
    ),
    Fault(
        "the first frame in the first group",
        "diffdistill/saliency.py",
        "groups = each[:, 1:].unflatten(1, (frames - 1, -1)).mean(dim=2)",
        "groups = each[:, :-1].unflatten(1, (frames - 1, -1)).mean(dim=2)",
    ),
    Fault(
        "one clip's reward for all",
        "diffdistill/methods/stream_r1.py",
        "clip = reliability(scores.mean(dim=-1) - penalty, self.beta)",
        "clip = reliability(scores.mean().expand(len(scores)) - penalty, self.beta)",
    ),
    Fault(
        "the balance rewards unevenness",
        "diffdistill/methods/stream_r1.py",
        "scores.mean(dim=-1) - penalty",
        "scores.mean(dim=-1) + penalty",
    ),
    Fault(
        "the balance's halves exchanged",
        "diffdistill/controllers.py",
        "(values[middle:].mean() - values[:middle].mean())",
        "(values[1:].mean() - values[:1].mean())",
    ),
    Fault(
        "no warm-up of the balance",
        "diffdistill/controllers.py",
        "self.seen < self.warmup or kept < 4",
        "kept < 4",
    ),
    Fault(
        "the regression's target is the state",
        "diffdistill/methods/causal_init.py",
        "mse(clean_of(state, self.student(state, told)), end)",
        "mse(clean_of(state, self.student(state, told)), states[0])",
    ),
    Fault(
        "a block's state of another level",
        "diffdistill/methods/causal_init.py",
        "chosen.append(levels[index])",
        "chosen.append(levels[index.flip(0)])",
    ),
    Fault(
        "the teacher is not guided",
        "diffdistill/methods/causal_init.py",
        "return guided(positive, self.teacher(state, negative), self.guidance, self.guidance_form)",
        "return positive",
    ),
    Fault(
        "one noise level for all blocks",
        "diffdistill/methods/causal_init.py",
        'self.draws.uniform(f"time/{b}", batch["ids"])',
        'self.draws.uniform("time", batch["ids"])',
    ),
    *(Fault(*fault) for fault in text_faults.FAULTS),
]


def main() -> int:
    """Run the tests without and with each fault; return 1 if a fault survives."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen: list[Fault | None] = [f for f in FAULTS if word in f.what]
    for fault in FAULTS:
        if (count := (ROOT / fault.file).read_text().count(fault.old)) != 1:
            raise SystemExit(f"{fault.what}: its text stands {count} times in {fault.file}")
    for module in IMPORTED:  # once, before forking
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_all([None, *chosen], Path(folder))
    survived = [what for what, outcome in outcomes if not outcome.startswith("caught")]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} faults caught")
    return 1 if survived else 0


def run_all(faults: list[Fault | None], folder: Path) -> list[tuple[str, str]]:
    """Return description and outcome of each fault; the first of all is none."""
    waiting = list(enumerate(faults))
    running: dict[int, tuple[Fault | None, Path]] = {}
    outcomes = []
    while waiting or running:
        while waiting and len(running) < WORKERS:
            number, fault = waiting.pop(0)
            copy = folder / str(number)
            running[start(fault, copy)] = (fault, copy)
        process, status = os.wait()
        fault, copy = running.pop(process)
        outcome = outcome_of(os.waitstatus_to_exitcode(status), copy)
        shutil.rmtree(copy)
        if fault is None:
            if outcome != "survived":
                raise SystemExit(f"the tests fail without any fault: {outcome}")
            continue
        outcomes.append((fault.what, outcome))
        print(f"{fault.what}: {outcome}", flush=True)
    return outcomes


def start(fault: Fault | None, copy: Path) -> int:
    """Copy the package with the fault in it; return the process that tests it."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, copy / name)
    names = {name for names in TESTS.values() for name in names.split()}
    if fault is not None:
        names = set(TESTS[fault.file].split())
        text = (copy / fault.file).read_text()
        (copy / fault.file).write_text(text.replace(fault.old, fault.new))
    process = os.fork()
    if process == 0:
        code = 98
        try:
            code = test(copy, sorted(names))
        except BaseException:
            traceback.print_exc()
        finally:  # nothing of the parent's may run here
            os._exit(code)
    return process


def test(copy: Path, names: list[str]) -> int:
    """Run the tests of a copy in this process, and return pytest's exit code."""
    import pytest

    with (copy / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(copy)
    sys.dont_write_bytecode = True
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # some are imported already
    sys.path.insert(0, str(copy))
    package = importlib.import_module("diffdistill")
    if Path(str(package.__file__)).parents[1].resolve() != copy.resolve():
        return 99
    files = [str(copy / "tests" / name) for name in names]
    options = ["-x", "-q", "--tb=no", "--color=no", "-p", "no:cacheprovider"]
    return int(pytest.main([*options, f"--rootdir={copy}", *files]))


def outcome_of(code: int, copy: Path) -> str:
    """Return ``caught by`` a test, ``survived``, or what went wrong."""
    if code == 0:
        return "survived"
    lines = (copy / "output.txt").read_text().splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    if code != 1 or not failed:
        return f"error {code}: {' | '.join(lines[-3:])}"
    return f"caught by {failed[0].split('::')[-1].split(' - ')[0]}"


if __name__ == "__main__":
    sys.exit(main())
