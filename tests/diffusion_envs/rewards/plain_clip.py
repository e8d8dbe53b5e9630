"""CLIP in plain torch, float64, on open_clip's tensors; and both published layouts on the disk.

What ours must equal. Attention is torch's own multi-head attention, which open_clip's files are
made for.
"""

import json

import torch
from torch.nn import functional

LETTERS = ["c", "a", "t", "d", "o", "g", "a</w>", "t</w>", "g</w>", ",</w>"]
MERGED = ["ca", "cat</w>", "do", "dog</w>"]
START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = {word: k for k, word in enumerate([*LETTERS, *MERGED, START, END])}
MERGES = ["#version: 0.2", "c a", "ca t</w>", "d o", "do g</w>"]
PLACES = 77
PROMPTS = ["A cat,  a Dog", "dog", "", "cat " * 90]
ROWS = [["a</w>", "cat</w>", ",</w>", "a</w>", "dog</w>"], ["dog</w>"], [], ["cat</w>"] * 90]

WIDTH = 20  # of embeddings
VISION = {"width": 32, "layers": 3, "heads": 2, "patch": 7, "size": 28}
TEXT = {"width": 24, "layers": 2, "heads": 3}
HEADS = VISION["heads"], TEXT["heads"]
GELU = {"gelu": functional.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


def state(generator, logit_scale=3.0, width=WIDTH):
    """Random tensors under open_clip's names, large enough that nothing is lost in the sum."""

    def normal(*shape, scale=1.0, shift=0.0):
        return shift + scale * torch.randn(*shape, generator=generator)

    tensors = {"logit_scale": torch.tensor(logit_scale)}

    def tower(prefix, width, layers):
        for k in range(layers):
            block = f"{prefix}transformer.resblocks.{k}."
            for norm in ("ln_1", "ln_2"):
                tensors[f"{block}{norm}.weight"] = normal(width, scale=0.2, shift=1.0)
                tensors[f"{block}{norm}.bias"] = normal(width, scale=0.2)
            shapes = {
                "attn.in_proj_": (3 * width, width),
                "attn.out_proj.": (width, width),
                "mlp.c_fc.": (4 * width, width),
                "mlp.c_proj.": (width, 4 * width),
            }
            for name, (rows, columns) in shapes.items():
                tensors[f"{block}{name}weight"] = normal(rows, columns, scale=columns**-0.5)
                tensors[f"{block}{name}bias"] = normal(rows, scale=0.2)

    def norm(name, width):
        tensors[f"{name}.weight"] = normal(width, scale=0.2, shift=1.0)
        tensors[f"{name}.bias"] = normal(width, scale=0.2)

    wide, patch = VISION["width"], VISION["patch"]
    tensors["visual.conv1.weight"] = normal(wide, 3, patch, patch, scale=0.1)
    tensors["visual.class_embedding"] = normal(wide)
    tensors["visual.positional_embedding"] = normal((VISION["size"] // patch) ** 2 + 1, wide)
    norm("visual.ln_pre", wide)
    tower("visual.", wide, VISION["layers"])
    norm("visual.ln_post", wide)
    tensors["visual.proj"] = normal(wide, width, scale=wide**-0.5)
    tensors["token_embedding.weight"] = normal(len(VOCABULARY), TEXT["width"])
    tensors["positional_embedding"] = normal(PLACES, TEXT["width"])
    tower("", TEXT["width"], TEXT["layers"])
    norm("ln_final", TEXT["width"])
    tensors["text_projection"] = normal(TEXT["width"], width, scale=TEXT["width"] ** -0.5)
    return tensors


# -- the formulas ----------------------------------------------------------------------------------


def _transformer(tensors, prefix, x, heads, act, mask=None):
    width = x.shape[-1]
    x = x.transpose(0, 1)  # [places, n, width]
    k = 0
    while f"{prefix}transformer.resblocks.{k}.ln_1.weight" in tensors:
        own = lambda name, k=k: tensors[f"{prefix}transformer.resblocks.{k}.{name}"]
        norm = lambda x, name, own=own: functional.layer_norm(
            x, (width,), own(f"{name}.weight"), own(f"{name}.bias")
        )
        y = norm(x, "ln_1")
        y, _ = functional.multi_head_attention_forward(
            *(y, y, y, width, heads, own("attn.in_proj_weight"), own("attn.in_proj_bias")),
            *(None, None, False, 0.0, own("attn.out_proj.weight"), own("attn.out_proj.bias")),
            need_weights=False,
            attn_mask=mask,
        )
        x = x + y
        y = functional.linear(norm(x, "ln_2"), own("mlp.c_fc.weight"), own("mlp.c_fc.bias"))
        x = x + functional.linear(GELU[act](y), own("mlp.c_proj.weight"), own("mlp.c_proj.bias"))
        k += 1
    return x.transpose(0, 1)


def image_embeddings(tensors, prepared, act):
    """Unit vectors of pictures [n, 3, size, size] that are normalised already."""
    tensors = {k: v.double() for k, v in tensors.items()}
    norm = lambda x, name: functional.layer_norm(
        x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    )
    patches = functional.conv2d(
        prepared.double(), tensors["visual.conv1.weight"], stride=VISION["patch"]
    )
    patches = patches.flatten(2).transpose(1, 2)
    first = tensors["visual.class_embedding"].expand(len(patches), 1, -1)
    x = torch.cat([first, patches], 1) + tensors["visual.positional_embedding"]
    x = _transformer(tensors, "visual.", norm(x, "visual.ln_pre"), VISION["heads"], act)
    embedding = norm(x[:, 0], "visual.ln_post") @ tensors["visual.proj"]
    return functional.normalize(embedding, dim=-1)


def text_embeddings(tensors, rows, act):
    """Unit vectors of prompts, each a list of words of the vocabulary; one after the other."""
    tensors = {k: v.double() for k, v in tensors.items()}
    vectors = []
    for row in rows:
        words = [START, *row[: PLACES - 2], END]  # padded with nothing: nothing looks ahead
        ids = torch.tensor([VOCABULARY[word] for word in words])
        x = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"][: len(ids)]
        mask = torch.full((len(ids), len(ids)), -torch.inf, dtype=torch.float64).triu(1)
        x = _transformer(tensors, "", x[None], TEXT["heads"], act, mask)[0, -1]
        x = functional.layer_norm(x, x.shape, tensors["ln_final.weight"], tensors["ln_final.bias"])
        vectors.append(functional.normalize(x @ tensors["text_projection"], dim=-1))
    return torch.stack(vectors)


def cosines(tensors, prepared, rows, act):
    """Of each picture with its prompt."""
    images = image_embeddings(tensors, prepared, act)
    return (images * text_embeddings(tensors, rows, act)).sum(-1)


# -- on the disk -----------------------------------------------------------------------------------


def write_vocabulary(folder):
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    (folder / "merges.txt").write_text("\n".join(MERGES) + "\n")


def write_open_clip(folder, tensors, name):
    """As HPS is published: a pickle with the tensors under ``state_dict``."""
    write_vocabulary(folder)
    torch.save({"epoch": 3, "state_dict": tensors}, folder / name)
    return folder


def hugging_face(tensors):
    """The same tensors under transformers' names, by hand."""
    renamed = {"logit_scale": tensors["logit_scale"]}
    for ours, theirs in (("vision_model", "visual."), ("text_model", "")):
        for k in range(VISION["layers"] if theirs else TEXT["layers"]):
            block = f"{theirs}transformer.resblocks.{k}."
            layer = f"{ours}.encoder.layers.{k}."
            for end in ("weight", "bias"):
                joined = tensors[f"{block}attn.in_proj_{end}"]
                third = len(joined) // 3
                for place, letter in enumerate("qkv"):
                    part = joined[place * third : (place + 1) * third].clone()
                    renamed[f"{layer}self_attn.{letter}_proj.{end}"] = part
                renamed[f"{layer}self_attn.out_proj.{end}"] = tensors[f"{block}attn.out_proj.{end}"]
                renamed[f"{layer}layer_norm1.{end}"] = tensors[f"{block}ln_1.{end}"]
                renamed[f"{layer}layer_norm2.{end}"] = tensors[f"{block}ln_2.{end}"]
                renamed[f"{layer}mlp.fc1.{end}"] = tensors[f"{block}mlp.c_fc.{end}"]
                renamed[f"{layer}mlp.fc2.{end}"] = tensors[f"{block}mlp.c_proj.{end}"]
    for end in ("weight", "bias"):
        renamed[f"vision_model.pre_layrnorm.{end}"] = tensors[f"visual.ln_pre.{end}"]
        renamed[f"vision_model.post_layernorm.{end}"] = tensors[f"visual.ln_post.{end}"]
        renamed[f"text_model.final_layer_norm.{end}"] = tensors[f"ln_final.{end}"]
    vision, text = "vision_model.embeddings.", "text_model.embeddings."
    renamed[f"{vision}class_embedding"] = tensors["visual.class_embedding"]
    renamed[f"{vision}position_embedding.weight"] = tensors["visual.positional_embedding"]
    renamed[f"{vision}patch_embedding.weight"] = tensors["visual.conv1.weight"]
    renamed[f"{text}token_embedding.weight"] = tensors["token_embedding.weight"]
    renamed[f"{text}position_embedding.weight"] = tensors["positional_embedding"]
    renamed["visual_projection.weight"] = tensors["visual.proj"].t().contiguous()
    renamed["text_projection.weight"] = tensors["text_projection"].t().contiguous()
    # older versions stored these, and published files still have them
    renamed[f"{vision}position_ids"] = torch.arange(len(tensors["visual.positional_embedding"]))
    renamed[f"{text}position_ids"] = torch.arange(PLACES)[None]
    return renamed


def config(act, width=WIDTH):
    """config.json as OpenAI's repository has it: with what transformers no longer knows."""
    legacy = {"bad_words_ids": None, "num_beams": 1, "torch_dtype": None, "return_dict": True}
    vision = {
        "hidden_size": VISION["width"],
        "intermediate_size": 4 * VISION["width"],
        "num_hidden_layers": VISION["layers"],
        "num_attention_heads": VISION["heads"],
        "patch_size": VISION["patch"],
        "image_size": VISION["size"],
    }
    text = {
        "hidden_size": TEXT["width"],
        "intermediate_size": 4 * TEXT["width"],
        "num_hidden_layers": TEXT["layers"],
        "num_attention_heads": TEXT["heads"],
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": PLACES,
        "bos_token_id": 0,
        "eos_token_id": 2,  # both wrong, as in many published files
    }
    shared = {"hidden_act": act, "projection_dim": width, "layer_norm_eps": 1e-5, **legacy}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": width,
        "logit_scale_init_value": 2.6592,
        "text_config": {"model_type": "clip_text_model", **shared, **text},
        "text_config_dict": None,
        "vision_config": {"model_type": "clip_vision_model", **shared, **vision},
        "vision_config_dict": None,
        "torch_dtype": "float32",
        "transformers_version": None,
    }


def write_hugging_face(folder, tensors, act, name="model.safetensors"):
    from safetensors.torch import save_file

    write_vocabulary(folder)
    width = tensors["visual.proj"].shape[1]
    (folder / "config.json").write_text(json.dumps(config(act, width)))
    renamed = hugging_face(tensors)
    if name.endswith(".safetensors"):
        save_file(renamed, folder / name)
    else:
        torch.save(renamed, folder / name)
    return folder
