import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, dynamic_module_utils

from diffdistill.config import parse_config
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines.block_diffusion import causal_mask
from diffdistill.pipelines.block_sampling import BlockSampler, UncachedSampler
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.llada2 import LLaDA2, additive_masks
from diffdistill.pipelines.reordering import ReorderedSampler
from diffdistill.pipelines.text_pair import TextPair
from diffdistill.pipelines.unmasking import Unmasking
from diffdistill.pipelines.wedlm import WeDLM
from diffdistill.projection import dense
from diffdistill.session import build
from diffdistill.types import Example, Progress, State
from tests.text_run import save_world, text_batch, text_values
from tests.tiny import edit_json
from tests.tiny_text import MASK, PAD, SIZES, causal_lm, save_lm, words

CPU = torch.device("cpu")
BLOCK = 4
LLADA2_CODE = """
from pathlib import Path

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

Path(MARK).touch()


class TinyConfig(Qwen3Config):
    model_type = "tiny_llada2"


class TinyModel(Qwen3Model):
    def forward(self, input_ids, attention_mask, position_ids, **kwargs):
        rows, length = input_ids.shape
        if attention_mask.shape != (rows, 1, length, length) or attention_mask.dtype != self.dtype:
            raise ValueError(f"no block attention mask: {attention_mask.shape}")
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


class TinyModelLM(Qwen3ForCausalLM):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = TinyModel(config)
        self.post_init()
"""
WEDLM_CODE = """
from pathlib import Path

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

Path(MARK).touch()


class TinyConfig(Qwen3Config):
    model_type = "wedlm"


class TinyModel(Qwen3Model):
    def forward(self, input_ids, attention_mask, position_ids, **kwargs):
        assert isinstance(attention_mask, dict), "a causal mask would be made of it"
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


class TinyModelLM(Qwen3ForCausalLM):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = TinyModel(config)
        self.post_init()
"""
CODES = {"llada2": (LLaDA2, LLADA2_CODE), "wedlm": (WeDLM, WEDLM_CODE)}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers copy the code of checkpoints to a place that goes away."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def save_with_code(folder: Path, name: str) -> tuple[Path, Path]:
    """Save a checkpoint that ships its code; return it, and a file that appears when it runs."""
    _, code = CODES[name]
    save_lm(folder)
    mark = folder.parent / "it-ran"
    (folder / "modeling_tiny.py").write_text(code.replace("MARK", repr(str(mark))))
    edit_json(
        folder / "config.json",
        model_type="wedlm" if name == "wedlm" else "tiny_llada2",
        architectures=["TinyModelLM"],
        auto_map={
            "AutoConfig": "modeling_tiny.TinyConfig",
            "AutoModelForCausalLM": "modeling_tiny.TinyModelLM",
        },
    )
    return folder, mark


def family_of(cls: Any, folder: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {"block": BLOCK, "max_length": 64}
    return cls(path=str(folder), device=CPU, **(defaults | options))


def logits_of(family: LanguageFamily, network: nn.Module, *, pads: int = 3) -> Tensor:
    """Return the logits of two rows of two blocks, the second with padding before it."""
    clean = torch.arange(20, 36).reshape(2, 8)
    noised = clean.clone()
    noised[:, [5, 7]] = family.mask_id
    padding = torch.zeros_like(clean, dtype=torch.bool)
    padding[1, :pads] = True
    told = family.condition(clean, padding)
    with torch.no_grad():
        return dense(family.predict(network, State(noised, torch.full((2,), 0.5)), told))


@pytest.mark.parametrize("name", CODES)
def test_a_checkpoints_code_runs_if_and_only_if_it_is_trusted(name: str, tmp_path: Path) -> None:
    cls, _ = CODES[name]
    folder, mark = save_with_code(tmp_path / "model", name)
    edit_json(folder / "config.json", qk_norm=False, attention_bias=False)  # for transformers' none
    with pytest.raises(UserError, match=r"code(?s:.*)set trust_remote_code: true"):
        family_of(cls, folder).network()
    assert not mark.exists()
    for convention in ("tide", "native"):
        trusted = family_of(cls, folder, trust_remote_code=True, convention=convention)
        network = trusted.network()
        assert mark.exists()
        assert type(network).__name__ == "TinyModelLM"
        plain = family_of(cls, save_lm(tmp_path / "plain"), convention=convention)
        expected = logits_of(plain, plain.network())
        torch.testing.assert_close(logits_of(trusted, network), expected, rtol=1e-5, atol=1e-5)


def test_code_of_which_transformers_has_the_model_is_not_asked_for(tmp_path: Path) -> None:
    folder, mark = save_with_code(tmp_path / "model", "llada2")
    edit_json(folder / "config.json", model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    assert type(family_of(LLaDA2, folder).network()).__name__ == "Qwen3ForCausalLM"
    assert not mark.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from transformers.gone import Gone", "does not run with transformers .*gone"),
        ("def broken(:", "does not run with transformers .*SyntaxError"),
    ],
)
def test_code_that_does_not_run_is_one_line(line: str, message: str, tmp_path: Path) -> None:
    folder, _ = save_with_code(tmp_path / "model", "llada2")
    (folder / "modeling_tiny.py").write_text(f"{line}\n")
    with pytest.raises(UserError, match=message) as caught:
        family_of(LLaDA2, folder, trust_remote_code=True).network()
    assert "\n" not in str(caught.value)


def test_what_the_code_itself_refuses_is_not_hidden(tmp_path: Path) -> None:
    """The tiny code refuses the masks that LLaDA2's does; that the family's pass is above."""
    folder, _ = save_with_code(tmp_path / "model", "llada2")
    family = family_of(LLaDA2, folder, trust_remote_code=True)
    network: Any = family.network()
    tokens = torch.arange(20, 24)[None]
    network.base_model._forward_pre_hooks.clear()
    with pytest.raises(ValueError, match="no block attention mask"):
        logits_of(family, network)
    additive_masks(network)
    full = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    assert network(tokens, full, torch.arange(4)[None]).logits.isfinite().all()


@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("convention", ["tide", "native"])
def test_llada2_is_given_additive_masks_of_every_row_without_infinities(
    convention: str, dtype: str, pads: int, tmp_path: Path
) -> None:
    family = family_of(
        LLaDA2, save_lm(tmp_path, name="qwen3-moe"), convention=convention, dtype=dtype
    )
    network: Any = family.network()
    masks: list[Tensor] = []
    network.base_model.layers[0].register_forward_pre_hook(
        lambda _module, _args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    assert not logits_of(family, network, pads=pads).isnan().any()
    [mask] = masks
    copies = 1 if convention == "tide" else 2
    assert mask.shape == (2, 1, 8 * copies, 8 * copies)
    assert mask.dtype == network.dtype
    assert mask.isfinite().all()
    assert (mask.diagonal(dim1=2, dim2=3) == 0).all()
    if convention == "tide":
        allowed = mask[:, 0] == 0
        assert allowed[0].all()
        assert allowed[1, :, pads:].all()
        assert torch.equal(allowed[1, :, :pads], torch.eye(8, dtype=torch.bool)[:, :pads])


def test_tides_row_has_no_end_tokens_after_the_answers(tmp_path: Path) -> None:
    save_lm(tmp_path, name="qwen3-moe")
    chat = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b = 1"})
    rows = {}
    for convention in ("tide", "native"):
        family = family_of(LLaDA2, tmp_path, convention=convention)
        pair = TextPair(family, family)
        [encoded] = pair.encode([Example("", messages=chat)])
        rows[convention] = encoded["student/tokens"].tolist()
    [whole] = [words("student").apply_chat_template(list(chat), return_dict=False)]
    assert rows["tide"] == whole[: len(rows["tide"])]
    assert words("student").decode(rows["tide"]).endswith("b = 1<|end|>")
    assert len(rows["native"]) % BLOCK == 0


class Suppressed(nn.Module):
    """A network as ``LLaDA2Pipeline`` calls it: a 2-D mask in, logits without the mask token."""

    device, dtype = CPU, torch.float32

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
        mask = causal_mask(torch.zeros(len(tokens), dtype=torch.long), 0, tokens.shape[1], BLOCK)
        output = self.network(tokens, attention_mask=mask, position_ids=position_ids)
        output.logits[..., MASK] = -torch.inf
        return output


@pytest.mark.parametrize("kind", [BlockSampler, UncachedSampler])
@pytest.mark.parametrize(
    ("unmasking", "steps", "threshold"),
    [
        (Unmasking(schedule="threshold", threshold=0.3), BLOCK, 0.3),
        (Unmasking(num_steps=2), 2, 1.0),
        (Unmasking(), BLOCK, 1.0),
    ],
)
def test_the_samplers_settle_what_diffusers_llada2_pipeline_does(
    kind: Any, unmasking: Unmasking, steps: int, threshold: float
) -> None:
    network = causal_lm("qwen3-moe")
    pipeline = LLaDA2Pipeline(
        model=Suppressed(network), scheduler=BlockRefinementScheduler(block_length=BLOCK)
    )
    pipeline.set_progress_bar_config(disable=True)
    own = kind(
        network=network, block=BLOCK, mask_id=MASK, pad_id=PAD, max_tokens=12, unmasking=unmasking
    )
    for prompt in ([1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11, 12]):  # whole blocks, as pipelines count
        with torch.no_grad():
            expected = pipeline(
                input_ids=torch.tensor([prompt]), gen_length=12, block_length=BLOCK,
                num_inference_steps=steps, threshold=threshold, editing_threshold=None,
                eos_early_stop=False, mask_token_id=MASK, output_type="seq",
            ).sequences  # fmt: skip
        [found] = own.sample([prompt], Draws(0), torch.tensor([0]))
        assert found.tolist() == expected[0].tolist()
        assert len(set(found.tolist())) > 1


@pytest.mark.parametrize(
    ("cls", "options", "kind"),
    [
        (LLaDA2, {}, UncachedSampler),
        (LLaDA2, {"cache": True}, BlockSampler),
        (WeDLM, {}, BlockSampler),
        (WeDLM, {"convention": "native"}, ReorderedSampler),
    ],
)
def test_a_family_samples_as_it_is_called(
    cls: Any, options: dict[str, Any], kind: Any, tmp_path: Path
) -> None:
    family = family_of(cls, save_lm(tmp_path), **options)
    sampler = family.sampler(family.network(), max_tokens=6)
    assert type(sampler) is kind
    [answer] = sampler.sample([[20, 21, 22]], Draws(0), torch.tensor([0]))
    assert 1 <= len(answer) <= 8
    assert family.mask_id not in answer.tolist()


def save_wedlm(folder: Path, kind: str, **changes: Any) -> Any:
    """Save what WeDLM's class would: Qwen's weights under a config of its own."""
    save_lm(folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    if kind == "qwen2":
        torch.manual_seed(3)
        sizes = {k: v for k, v in SIZES.items() if k != "head_dim"} | {"vocab_size": size}
        network: Any = Qwen2ForCausalLM(Qwen2Config(**sizes, intermediate_size=48)).eval()
        for layer in network.model.layers:
            nn.init.normal_(layer.self_attn.q_proj.bias)
    else:
        network = causal_lm(vocab_size=size, rope_theta=77.0)
    network.save_pretrained(str(folder))
    file = folder / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")  # the released config is of transformers 4
    config |= {"rope_theta": rope["rope_theta"], "qk_norm": kind == "qwen3"}
    config |= {"attention_bias": kind == "qwen2", "auto_map": {"AutoModelForCausalLM": "a.B"}}
    config |= {"model_type": "wedlm", "architectures": ["WeDLMForCausalLM"]}
    file.write_text(json.dumps(config | changes))
    return network


@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_wedlm_loads_without_its_own_code(kind: str, tmp_path: Path) -> None:
    original = save_wedlm(tmp_path, kind)
    family = family_of(WeDLM, tmp_path, convention="native")
    network: Any = family.network()
    assert type(network) is type(original)
    tokens = torch.arange(20, 28)[None]
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    with torch.no_grad():
        found = network(tokens, attention_mask=mask).logits
        expected = original(tokens, attention_mask=mask).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"qk_norm": False},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ],
)
def test_a_wedlm_that_is_no_qwen_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    save_wedlm(tmp_path, "qwen3", **changes)
    with pytest.raises(UserError, match="neither a Qwen3 nor a Qwen2"):
        family_of(WeDLM, tmp_path).network()


def test_the_config_may_name_the_mask_token(tmp_path: Path) -> None:
    save_lm(tmp_path)
    tokenizer = words("student")
    edit_json(tmp_path / "tokenizer_config.json", mask_token=None)
    edit_json(tmp_path / "config.json", mask_token_id=tokenizer.mask_token_id + 1)
    assert family_of(WeDLM, tmp_path).mask_id == tokenizer.mask_token_id + 1
    assert family_of(WeDLM, tmp_path, mask_token="<mask>").mask_id == tokenizer.mask_token_id


@pytest.mark.parametrize(
    ("cls", "convention"), [(LLaDA2, "tide"), (LLaDA2, "native"), (WeDLM, "native")]
)
def test_flex_attention_is_refused_where_there_is_no_block_mask(cls: Any, convention: str) -> None:
    with pytest.raises(UserError, match="set attention: sdpa"):
        family_of(cls, Path("none"), convention=convention, attention="flex_attention")


def test_a_mask_by_kind_of_layer_is_the_mask_itself(tmp_path: Path) -> None:
    family = family_of(WeDLM, save_lm(tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    found, expected = logits_of(family, family.network()), logits_of(family, plain)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("convention", ["tide", "native"])
@pytest.mark.parametrize(
    ("name", "teacher", "variant"), [("llada2", "moe", "cross"), ("wedlm", "dense", "shared")]
)
def test_tide_learns_from_a_config_with_such_a_teacher(
    name: str, teacher: str, variant: str, convention: str, tmp_path: Path
) -> None:
    world = save_world(tmp_path)
    family = {"name": name, "path": str(world / teacher), "convention": convention}
    family |= {"block": BLOCK, "max_length": 96}
    values = text_values(
        world, "tide", method={"variant": variant}, roles={"teacher": {"family": family}}
    )
    session = build(parse_config(values), CPU)
    assert isinstance(session.family, TextPair)
    assert session.family.teacher.convention == convention
    [loss] = session.method.losses(text_batch(session.family, 4), Progress(1, 4))
    assert loss.value.isfinite()
    assert loss.metrics["active_chunks"] > 0
    assert loss.metrics["distillation"] > 0
    loss.value.backward()
    assert all(p.grad is not None for p in session.roles["student"].parameters().values())
    assert all(p.grad is None for p in session.roles["teacher"].network.parameters())
