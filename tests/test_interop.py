"""Row layouts, the released folder, and everything about it that must be refused."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from qwen_models import EQUAL, GROUPED, NARROW, pack_rows, released, tokens
from safetensors.torch import save_file

from minigated.__main__ import main
from minigated.attention import AttentionShape
from minigated.errors import InputError
from minigated.interop import (
    from_qwen3,
    from_qwen3_next,
    from_qwen_gated,
    gate_granularity,
    join_per_group,
    join_per_head,
    load_checkpoint_folder,
    load_tokenizer,
    per_group_to_per_head,
    per_head_to_per_group,
    split_per_group,
    split_per_head,
    to_qwen_gated,
    widen_headwise,
)
from minigated.lm import build_lm
from minigated.variants import parameters

SHAPE = AttentionShape(**GROUPED)
ARMS = {None: "none", "headwise": "g1_headwise", "elementwise": "g1_elementwise"}
FIRST = "model.layers.0.self_attn.q_proj.weight"


# ------------------------------------------------------------------------------------ permutations
def labelled(kind: str, shape: AttentionShape, rows: int) -> torch.Tensor:
    """Rows that say what they are: query rows of head h are 100 h + d, gate rows the negative of that minus one."""
    values = torch.tensor([100.0 * head + row for head in range(shape.heads) for row in range(rows)])
    return (values if kind == "query" else -1.0 - values)[:, None].expand(-1, 3)


def test_the_picture_of_the_three_layouts():
    """The rows drawn in the module's docstring: H = 4, K = 2, D = 1."""
    shape = AttentionShape(width=3, heads=4, kv_heads=2, head_width=1)
    query, gate = labelled("query", shape, 1), labelled("gate", shape, 1)
    per_group, per_head = join_per_group(query, gate, shape), join_per_head(query, gate, shape)
    assert per_group[:, 0].tolist() == [0, 100, -1, -101, 200, 300, -201, -301]
    assert per_head[:, 0].tolist() == [0, -1, 100, -101, 200, -201, 300, -301]


@pytest.mark.parametrize("sizes", [GROUPED, EQUAL, dict(width=5, heads=4, kv_heads=1, head_width=2)])
@pytest.mark.parametrize("gate_rows", ["elementwise", "headwise"])
def test_splitting_takes_apart_what_plain_loops_packed(sizes, gate_rows):
    shape = AttentionShape(**sizes)
    query = labelled("query", shape, shape.head_width)
    gate = labelled("gate", shape, shape.head_width if gate_rows == "elementwise" else 1)
    packed = pack_rows(query, gate, shape.heads, shape.kv_heads)
    assert gate_granularity(len(packed), shape) == gate_rows
    for found, wanted in zip(split_per_group(packed, shape), (query, gate), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(join_per_group(query, gate, shape), packed)


def test_a_bare_q_proj_has_no_gate_rows():
    query, gate = split_per_group(labelled("query", SHAPE, 8), SHAPE)
    assert torch.equal(query, labelled("query", SHAPE, 8)) and gate.shape == (0, 3)


@pytest.mark.parametrize("sizes", [GROUPED, EQUAL])
def test_conversion_between_the_layouts(sizes):
    """The identities of the facts, section 6.1, against view and permute as they stand there."""
    shape = AttentionShape(**sizes)
    heads, kv, width, group = shape.heads, shape.kv_heads, shape.head_width, shape.heads // shape.kv_heads
    packed = torch.randn(2 * heads * width, 7)
    next_rows = packed.view(kv, 2, group, width, 7).permute(0, 2, 1, 3, 4).reshape(2 * heads * width, 7)
    assert torch.equal(per_group_to_per_head(packed, shape), next_rows)
    assert torch.equal(per_head_to_per_group(next_rows, shape), packed)
    query = packed.view(kv, 2, group, width, 7)[:, 0].reshape(heads * width, 7)
    gate = packed.view(kv, 2, group, width, 7)[:, 1].reshape(heads * width, 7)
    for split, rows in ((split_per_group, packed), (split_per_head, next_rows)):
        assert torch.equal(split(rows, shape)[0], query) and torch.equal(split(rows, shape)[1], gate)
    assert torch.equal(join_per_head(query, gate, shape), next_rows)
    assert torch.equal(packed, next_rows) == (group == 1)  # the layouts coincide without groups, and only then


def test_widened_headwise_rows_follow_their_head():
    wide = widen_headwise(torch.tensor([[1.0], [2.0]]), AttentionShape(1, 2, 1, 3))
    assert wide.flatten().tolist() == [1, 1, 1, 2, 2, 2]


def test_a_q_proj_of_no_kind_is_refused():
    with pytest.raises(InputError, match=r"q_proj has 50 rows; 6 heads of width 8 accept 48 \(none\), 54 \(headwise\)"):
        gate_granularity(50, SHAPE)


# ------------------------------------------------------------------------------------ state dicts
@pytest.mark.parametrize("gate", ARMS)
@pytest.mark.parametrize("sizes", [GROUPED, NARROW, EQUAL])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_of_the_released_layout(gate, sizes, tied):
    state, config = released(sizes, gate, tied=tied)
    model = from_qwen_gated(state, config)
    exported, exported_config = to_qwen_gated(model)
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in state.items())
    shared = (config.keys() & exported_config.keys()) - {"model_type"}
    assert len(shared) >= 14 and {k: config[k] for k in shared} == {k: exported_config[k] for k in shared}
    again = from_qwen_gated(exported, exported_config)
    assert again.config == model.config and torch.equal(again(tokens()), model(tokens()))


def test_loaded_weights_are_copies():
    state, config = released(GROUPED, "elementwise")
    before = {name: tensor.clone() for name, tensor in state.items()}
    model = from_qwen_gated(state, config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_a_tied_head_trains_with_the_embedding():
    model = from_qwen_gated(*released(GROUPED, "headwise", tied=True))
    model(tokens()).square().mean().backward()
    assert model.head.weight is model.embedding.weight and model.head.weight.grad is not None
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_model_without_qk_norm_is_recognised():
    state, config = released(GROUPED, None)
    state = {name: tensor for name, tensor in state.items() if "q_norm" not in name and "k_norm" not in name}
    model = from_qwen_gated(state, config | {"use_qk_norm": False})
    assert not model.config.qk_norm
    assert set(to_qwen_gated(model)[0]) == set(state)


def test_dtype_is_kept_or_chosen():
    state, config = released(GROUPED, "elementwise")
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    kept, chosen = from_qwen_gated(state, config), from_qwen_gated(state, config, torch.float32)
    assert {weight.dtype for weight in kept.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in chosen.parameters()} == {torch.float32}
    assert kept.rotary.cos.dtype == torch.float32  # a rounded table would rotate late positions wrongly
    assert torch.isfinite(kept(tokens())).all()


def test_the_released_sizes_give_the_released_parameter_counts():
    """Section 6.2 of the facts, on the meta device: 1720.8, 1721.8 and 1728.2 million."""
    counts = {}
    for kind, ffn in (("none", 6144), ("g1_headwise", 6144), ("g1_elementwise", 5504)):
        model = build_lm("1.7B-28L", device="meta", variant=kind, ffn_width=ffn)
        state, config = to_qwen_gated(model)
        counts[kind] = parameters(from_qwen_gated(state, config | {"intermediate_size": 6144})), state[FIRST].shape[0]
    millions = {kind: (round(count / 1e6, 1), rows) for kind, (count, rows) in counts.items()}
    assert millions == {"none": (1720.8, 2048), "g1_headwise": (1721.8, 2064), "g1_elementwise": (1728.2, 4096)}


# ------------------------------------------------------------------------------------ refused state dicts
def refused(change_state=None, change_config=None, gate="elementwise", loader=from_qwen_gated, **options) -> str:
    state, config = released(GROUPED, gate, **options)
    state, config = (change_state or dict)(state), config | (change_config or {})
    with pytest.raises(InputError) as caught:
        loader(state, config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def without(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def test_missing_and_unexpected_weights_are_named_in_one_line():
    def change(state):
        extra = {f"model.layers.{layer}.self_attn.q_proj.bias": torch.zeros(3) for layer in range(2)}
        return without("model.layers.1.mlp.up_proj.weight")(state) | extra

    message = refused(change)
    assert "1 missing (model.layers.1.mlp.up_proj.weight)" in message
    assert "2 unexpected (model.layers.0.self_attn.q_proj.bias, model.layers.1.self_attn.q_proj.bias)" in message


def test_biases_that_nobody_asked_for():
    """What a plain Qwen2 would bring: nothing is missing, and it must not be loaded without its biases."""
    biases = {f"model.layers.{n}.self_attn.{name}_proj.bias": torch.zeros(3) for n in (0, 1) for name in "qkv"}
    message = refused(lambda state: state | biases)
    assert "6 unexpected (model.layers.0.self_attn.q_proj.bias, " in message and message.endswith(", ...)")
    assert "missing" not in message


def test_more_layers_in_the_config_than_in_the_weights():
    assert "11 missing" in refused(change_config={"num_hidden_layers": 3})


def test_an_untied_head_that_is_missing():
    assert "1 missing (lm_head.weight)" in refused(without("lm_head.weight"), tied=False)


def test_a_tied_head_that_differs():
    assert "lm_head.weight differs" in refused(change_config={"tie_word_embeddings": True}, tied=False)


def test_a_tied_head_saved_twice_is_accepted():
    state, config = released(GROUPED, "headwise")
    model = from_qwen_gated(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, config)
    assert model.config.tied and model.head.weight is model.embedding.weight


def test_a_misshapen_weight():
    name = "model.layers.1.mlp.down_proj.weight"
    message = refused(lambda state: state | {name: state[name].T.contiguous()})
    assert "blocks.1.ffn.down_proj.weight has shape [40, 48]; the config asks for [48, 40]" in message


@pytest.mark.parametrize(
    "change, said",
    [
        ({"headwise_attn_output_gate": True}, "headwise_attn_output_gate = True, the weights say False"),
        ({"elementwise_attn_output_gate": False}, "elementwise_attn_output_gate = False, the weights say True"),
        ({"head_dim": 16}, "head_dim = 16, the weights say 8"),
        ({"hidden_size": 64}, "hidden_size = 64, the weights say 48"),
        ({"use_qk_norm": False}, "use_qk_norm = False, the weights say True"),
        ({"num_attention_heads": 5}, "5 query heads cannot share 2"),
        ({"num_attention_heads": 4}, "q_proj has 96 rows; 4 heads of width 8 accept"),
        ({"num_attention_heads": "6"}, "num_attention_heads as '6'; int is accepted"),
        ({"num_key_value_heads": 0}, "kv_heads must be at least 1, got 0"),
        ({"rms_norm_eps": None}, "rms_norm_eps as None; float is accepted"),
        ({"hidden_act": "gelu"}, "hidden_act as 'gelu'; only 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window as True; only False"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type as 'yarn'; only 'default'"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor as 0.25; only 1.0"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types as"),
        ({"num_experts": 8}, "gives 8 experts; model.layers.0.mlp.gate.weight is missing"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, said):
    assert said in refused(change_config=change)


def test_each_loader_refuses_the_others_models():
    assert "unknown gate for this loader 'g1_headwise'; accepted: none" in refused(gate="headwise", loader=from_qwen3)
    rotary = {"partial_rotary_factor": 1.0}
    for gate in (None, "headwise"):
        assert "accepted: g1_elementwise" in refused(gate=gate, loader=from_qwen3_next, change_config=rotary)
    assert "partial_rotary_factor as 0.25" in refused(loader=from_qwen3_next)  # its default where nothing is said


def test_weights_of_another_kind_of_model():
    assert "model.embed_tokens.weight is missing" in refused(lambda state: {"conv.weight": torch.zeros(3, 3)})
    assert "has shape [9]; a matrix" in refused(lambda state: state | {FIRST: torch.zeros(9)})


def test_variants_the_release_cannot_hold_are_not_exported():
    with pytest.raises(InputError, match="'g2_elementwise'; accepted: none, g1_headwise, g1_elementwise"):
        to_qwen_gated(build_lm("lm_nano", variant="g2_elementwise"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": "yarn", "rope_factor": 4.0, "trained_context": 64}, "rope_scaling.*'yarn'; accepted: none"),
        ({"qk_order": ("rope", "norm", "gate")}, "accepted: norm before rope"),
        ({"experts": 4, "top_k": 2}, "experts for the released layout 4; accepted: 0"),
    ],
)
def test_what_the_release_has_no_words_for_is_not_exported(changes, said):
    """It would come back as another model."""
    with pytest.raises(InputError, match=said):
        to_qwen_gated(build_lm("lm_nano", layers=1, **changes))


def test_the_shift_of_norms_is_made_in_the_wide_dtype():
    state, config = released(GROUPED, "elementwise")
    config = config | {"partial_rotary_factor": 1.0}
    narrow = {name: tensor.bfloat16() for name, tensor in state.items()}
    model = from_qwen3_next(narrow, config, torch.float32)
    assert torch.equal(model.norm.weight, 1 + narrow["model.norm.weight"].float())
    wide = {name: tensor.double() + 1e-12 for name, tensor in state.items()}
    model = from_qwen3_next(wide, config)
    assert torch.equal(model.norm.weight, 1 + wide["model.norm.weight"])


def test_positions_are_where_the_weights_are():
    state, config = released(GROUPED, None)
    model = from_qwen_gated({name: tensor.to("meta") for name, tensor in state.items()}, config)
    assert model.rotary.cos.device == model.embedding.weight.device == torch.device("meta")


# ------------------------------------------------------------------------------------ folders
def write_folder(folder: Path, state: dict, config: dict, form: str) -> Path:
    """Writes config.json and the weights as safetensors or pickle, whole or in two shards with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    suffix = "safetensors" if form.startswith("safetensors") else "bin"
    stem, write = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    if not form.endswith("shards"):
        write(state, folder / f"{stem}.{suffix}")
        return folder
    names, shards = list(state), {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"{stem}-{number:05d}-of-00002.{suffix}"
        write({name: state[name] for name in part}, folder / file)
        shards |= {name: file for name in part}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder


@pytest.mark.parametrize("form", ["safetensors", "safetensors shards", "bin", "bin shards"])
@pytest.mark.parametrize("gate", ARMS)
def test_a_released_folder_loads(tmp_path, gate, form):
    """The arm is found out, the narrowed feed-forward read off the weights, the logits those of the state dict."""
    state, config = released(GROUPED, gate, ffn=36)
    model = load_checkpoint_folder(write_folder(tmp_path / "released", state, config, form))
    assert model.config.variant == ARMS[gate] and model.config.ffn_width == 36 and config["intermediate_size"] == 40
    assert torch.equal(model(tokens()), from_qwen_gated(state, config)(tokens()))


def test_a_folder_written_by_transformers_loads(tmp_path, transformers):
    from qwen_models import qwen3, qwen3_next

    pairs = {"none": qwen3(transformers, GROUPED), "g1_elementwise": qwen3_next(transformers, GROUPED)}
    for variant, theirs in pairs.items():
        theirs.save_pretrained(tmp_path / variant)
        ours = load_checkpoint_folder(tmp_path / variant)
        assert ours.config.variant == variant
        with torch.no_grad():
            assert (ours(tokens()) - theirs(tokens()).logits).abs().max() < 1e-5


def test_the_old_pickle_format_loads(tmp_path):
    state, config = released(GROUPED, None)
    write_folder(tmp_path, {}, config, "bin")
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert load_checkpoint_folder(tmp_path).config.variant == "none"


class Harmful:
    """Unpickled without care, it creates the file it names."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("writer", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2))])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, writer, sharded):
    state, config = released(GROUPED, None)
    write_folder(tmp_path, state, config, "bin shards" if sharded else "bin")
    file = tmp_path / ("pytorch_model-00002-of-00002.bin" if sharded else "pytorch_model.bin")
    harmed = tmp_path / "harmed"
    writer(state | {"payload": Harmful(harmed)}, file)
    with pytest.raises(InputError, match=f"{file.name} was refused: .*could run code; safetensors"):
        load_checkpoint_folder(tmp_path)
    assert not harmed.exists()
    torch.load(file, weights_only=False) if writer is torch.save else pickle.loads(file.read_bytes())
    assert harmed.exists()  # the same bytes do their harm where nobody looks


def test_the_index_may_not_point_elsewhere(tmp_path):
    state, config = released(GROUPED, None)
    folder = write_folder(tmp_path / "released", state, config, "safetensors shards")
    save_file(state, tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(state, name)}))
        with pytest.raises(InputError, match="outside.safetensors'; a file beside it is accepted"):
            load_checkpoint_folder(folder)


def damaged(tmp_path, change, form="safetensors") -> str:
    state, config = released(GROUPED, None)
    folder = write_folder(tmp_path / "released", state, config, form)
    change(folder)
    with pytest.raises(InputError) as caught:
        load_checkpoint_folder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cut(name, keep=200):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    "change, form, said",
    [
        (lambda folder: (folder / "config.json").unlink(), "bin", "config.json is missing"),
        (write("config.json", "{"), "bin", "config.json is not JSON"),
        (write("config.json", "[1]"), "bin", "config.json holds a list; a JSON object is accepted"),
        (write("config.json", '{"model_type": "llama"}'), "bin", "model_type 'llama'; accepted: qwen2, "),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors", "holds no weights; accepted: m"),
        (cut("model.safetensors"), "safetensors", "model.safetensors cannot be read"),
        (cut("pytorch_model.bin", 5000), "bin", "pytorch_model.bin cannot be read"),
        (cut("pytorch_model.bin", 0), "bin", "pytorch_model.bin cannot be read"),
        (lambda folder: torch.save([1, 2], folder / "pytorch_model.bin"), "bin", "holds other things than tensors"),
        (lambda folder: torch.save({"a": 1}, folder / "pytorch_model.bin"), "bin", "holds other things than tensors"),
        (write("model.safetensors.index.json", '{"weight_map": []}'), "safetensors shards", "has no weight_map"),
        (lambda folder: next(folder.glob("*-00002-of*")).unlink(), "safetensors shards", "00002.safetensors is m"),
    ],
)
def test_a_damaged_folder_gives_one_clear_line(tmp_path, change, form, said):
    assert said in damaged(tmp_path, change, form)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        load_checkpoint_folder(tmp_path / "nowhere")


def test_the_folders_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    with pytest.raises(InputError, match="tokenizer.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"gates": 0, "open": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("open gates wide").ids == [1, 0, 2]


@pytest.mark.parametrize("gate", ARMS)
def test_the_measure_command_on_a_released_folder(tmp_path, gate, capsys):
    """From the folder to the table of sinks and massive activations, as a user would type it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    state, config = released(GROUPED, gate)
    folder = write_folder(tmp_path / "released", state, config, "bin")
    words = ["?", "the", "and", "to", "I", "of", ",", "."]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    command = ["measure", str(folder), "--tokens", "24", "--sequences", "3", "--json", "--device", "cpu"]
    assert main(command) == 0
    measures = json.loads(capsys.readouterr().out)
    assert measures["tokens"] == 24 and len(measures["first_token_share"]) == 2
    assert len(measures["max_activation"]["ffn_residual"]) == 2
    assert (measures["gate"] is None) == (gate is None)


def test_the_measure_command_refuses_in_one_line(tmp_path, capsys):
    state, config = released(GROUPED, None)
    folder = write_folder(tmp_path / "released", without(FIRST)(state), config, "bin")
    assert main(["measure", str(folder), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        f"error: the weights are not those of a dense Qwen decoder: {FIRST} is missing"
    ]
