"""Foreign weights enter here, once: a timm or transformers folder becomes an artifact with an origin and no parents.

The folder is read by its own library, without any code of its own and from safetensors alone, and saved again in the
form that fledge's stages write. Whatever could not be carried over exactly is refused.
"""

import json
import re
from pathlib import Path
from typing import Any

from fledge import artifact, config, files
from fledge.artifact import Artifact
from fledge.errors import InputError
from fledge.redact import redact

VISION = ("vision-encoder", "image-classifier")
CONVERSES = ("chat-model", "reward-model")
AUTO = {
    "text-encoder": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "chat-model": "AutoModelForCausalLM",  # or AutoModelForImageTextToText, where it sees
    "reward-model": "AutoModelForSequenceClassification",
    "dual-encoder": "VisionTextDualEncoderModel",
}
KINDS = (*VISION, *AUTO)
PADS = ("causal-lm", "chat-model", "reward-model")
NEVER_IN_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))
"""Bytes that no text holds: whatever stands for one of them is free."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
UNUSED = ("cls.seq_relationship", "position_ids", "pooler.")  # heads and buffers that a masked LM has no use for


def bring_in(kind: str, source: str, folder: str | Path, pad_token: str | None = None) -> Artifact:
    """Write the artifact `folder` of `kind` from `source`, a local folder or a name on the hub.

    Args:
        pad_token: what pads from now on, for a language model whose tokenizer has nothing that does, or its end token.
    """
    if kind not in KINDS:
        raise InputError(
            f"{kind!r} is no kind to import, expected one of {', '.join(KINDS)}{config.nearest(kind, list(KINDS))}"
        )
    if pad_token is not None and kind not in PADS:
        raise InputError(f"--pad-token belongs to a {', '.join(PADS[:-1])} or {PADS[-1]}, not to a {kind}")
    origin = _folder(source)
    _only_safetensors(origin)
    digests = {name: files.sha256(origin / name) for name in files.members(origin) if "/" not in name}
    parts = _timm(kind, origin) if kind in VISION else _transformers(kind, origin, pad_token)
    about = {"stage": "import", "name": Path(folder).name, "kind": kind, "source": str(source)}
    about |= {} if pad_token is None else {"pad_token": pad_token}
    return artifact.write(
        folder, kind=kind, config=config.to_yaml(about), origin={"source": str(source), "files": digests}, **parts
    )


def _folder(source: str) -> Path:
    """The local folder of a source; one on the hub is fetched without its pickles."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not HUB_NAME.fullmatch(source):
        state = "is a file" if path.exists() else "does not exist"
        raise InputError(f"{source} {state}; expected a folder with config.json and model.safetensors, or a hub name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_FILES))
    except Exception as error:  # offline, unknown, gated, interrupted: the library's words say which
        words = redact(" ".join(str(error).split()))[:300]
        raise InputError(
            f"{source} is no folder here, and could not be fetched from the Hugging Face hub ({type(error).__name__}: "
            f"{words}); check the name and the network, or give a local folder"
        ) from None


def _only_safetensors(folder: Path) -> None:
    names = files.members(folder)
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.lower().endswith(files.PICKLES)]
        if pickles:
            raise InputError(
                f"{folder} holds its weights as {', '.join(pickles[:3])}: a pickle, which can run code when it is "
                "read. Save them as model.safetensors first"
            )
        raise InputError(f"{folder} has no .safetensors file; expected config.json and model.safetensors")
    if "config.json" not in names:
        raise InputError(f"{folder} has no config.json; expected the folder of a timm or transformers model")
    if not {artifact.WEIGHTS, f"{artifact.WEIGHTS}.index.json"} & set(names):  # a loader would look for a pickle next
        raise InputError(f"{folder} has no {artifact.WEIGHTS}, nor an index of its shards; save the weights as that")
    if stray := files.stray_shards(folder, names):
        raise InputError(f"{folder}: {'; '.join(stray)}; save the model again in one folder")
    if _description(folder).get("auto_map"):
        raise InputError(f"{folder} needs code of its own (auto_map in config.json), which fledge does not run")


def _description(folder: Path) -> dict[str, Any]:
    """config.json."""
    try:
        read = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read as JSON ({error})") from None
    if not isinstance(read, dict):
        raise InputError(f"{folder / 'config.json'} is not a JSON object")
    return read


# ------------------------------------------------------------------------------------------------ timm


def _timm(kind: str, folder: Path) -> dict[str, Any]:
    """A plain ViT of timm, rebuilt as ours and shown to be the same function."""
    import timm
    import torch
    from timm.data.config import resolve_data_config

    from fledge.models import vit

    if "architecture" not in _description(folder):
        raise InputError(f"{folder} is no timm folder (no `architecture` in config.json); a {kind} is read by timm")
    try:
        model: Any = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True).eval()
    except Exception as error:
        raise InputError(f"{folder} cannot be read as a timm model ({_words(error)})") from error
    sizes = _vit_sizes(model, folder)
    classes = int(model.num_classes) if kind == "image-classifier" else 0
    if kind == "image-classifier" and not classes:
        raise InputError(f"{folder} has no classifier (num_classes 0); import it as a vision-encoder")
    own = vit.build(sizes, num_classes=classes).eval()
    left_out = [] if classes else ["head.*", "fc_norm.*"]
    artifact.load_state(own, model.state_dict(), expect_unexpected=left_out, where=str(folder))
    images = torch.rand(2, sizes.in_chans, sizes.img_size, sizes.img_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = (m(images) if classes else m.forward_features(images) for m in (model, own))
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=1e-4, rtol=1e-4):
        raise InputError(
            f"{folder} is not a plain ViT: rebuilt from its sizes it computes something else; expected patches, "
            "class token, pre-norm blocks, and the class token as its feature"
        )
    given = resolve_data_config({}, model=model)
    view = {"mean": list(given["mean"]), "std": list(given["std"]), "size": sizes.img_size}
    view["resize"] = round(sizes.img_size / float(given.get("crop_pct") or 1.0))
    labels = model.pretrained_cfg.get("label_names") or [str(i) for i in range(classes)]
    return {
        "save": lambda to: vit.save(own, sizes, view, to, list(labels) if classes else None),
        "architecture": vit.architecture(sizes) | ({"classes": classes, "pool": "cls"} if classes else {}),
        "preprocessing": view,
    }


def _vit_sizes(model: Any, folder: Path) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    from fledge.models.vit import ViTConfig

    if type(model) is not VisionTransformer:
        raise InputError(f"{folder} is a {type(model).__name__}, expected timm's VisionTransformer")
    patch: Any = model.patch_embed
    block: Any = model.blocks[0]
    if patch.img_size[0] != patch.img_size[1] or patch.patch_size[0] != patch.patch_size[1]:
        raise InputError(
            f"{folder} reads pictures of {patch.img_size} in patches of {patch.patch_size}, expected squares"
        )
    return ViTConfig(
        img_size=patch.img_size[0],
        patch_size=patch.patch_size[0],
        in_chans=patch.proj.in_channels,
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
    )


# ------------------------------------------------------------------------------------------------ transformers


def _transformers(kind: str, folder: Path, pad_token: str | None) -> dict[str, Any]:
    import transformers

    from fledge.models import language

    is_dual = _description(folder).get("model_type") == "vision-text-dual-encoder"
    if is_dual != (kind == "dual-encoder"):
        raise InputError(f"{folder} is {'a' if is_dual else 'no'} vision-text-dual-encoder, expected a {kind}")
    auto = language.writes(folder) if kind == "chat-model" else AUTO[kind]
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False, "dtype": "auto"}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its loading report is told below, in a sentence
    try:
        model, report = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:
        raise InputError(f"{folder} cannot be read as a {kind} by {auto} ({_words(error)})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    left = [name for name in report["unexpected_keys"] if not any(unused in name for unused in UNUSED)]
    faults = {"missing": report["missing_keys"], "left over": left, "of another shape": report["mismatched_keys"]}
    named = "; ".join(f"{what}: {', '.join(sorted(map(str, names))[:6])}" for what, names in faults.items() if names)
    if named:
        raise InputError(f"{folder} does not fit {auto}, which a {kind} is read with ({named})")
    tokens = _tokenizer(kind, folder)
    processor = language.read_processor(folder) if auto == "AutoModelForImageTextToText" else None
    if pad_token is not None:
        if processor is not None:
            raise InputError(f"--pad-token is of models that read text alone; {folder} sees, and its processor pads")
        _pad_with(pad_token, model, tokens, folder)
    _check_language(kind, model, tokens, folder)
    return {
        "save": lambda to: language.save(model, processor or tokens, to),
        "architecture": {"name": type(model).__name__, "parameters": language.size(model)},
        "preprocessing": _preprocessing(kind, model, tokens),
    }


def _tokenizer(kind: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{folder} has no tokenizer that can be read ({_words(error)}); a {kind} needs one") from error
    if not tokens.is_fast:
        raise InputError(f"the tokenizer of {folder} has only a slow form; save its fast one (tokenizer.json) first")
    return tokens


def _check_language(kind: str, model: Any, tokens: Any, folder: Path) -> None:
    """What the stages will take for granted of this kind."""
    if kind == "chat-model" and tokens.chat_template is None:
        raise InputError(f"the tokenizer of {folder} has no chat template; import it as a causal-lm")
    if kind == "text-encoder" and tokens.mask_token is None:
        raise InputError(f"the tokenizer of {folder} has no mask token, which a text-encoder needs")
    if kind == "reward-model":
        if model.config.num_labels != 1:
            raise InputError(f"{folder} has {model.config.num_labels} labels, expected 1: a reward is one number")
        if tokens.eos_token is None:
            raise InputError(f"the tokenizer of {folder} has no end token, at which a reward-model reads an answer")
        _check_padding(model.config.get_text_config().pad_token_id, tokens, folder)
    rows = model.get_input_embeddings().weight.shape[0] if kind != "dual-encoder" else len(tokens)
    if len(tokens) > rows:
        raise InputError(f"the tokenizer of {folder} has {len(tokens)} tokens, but the model only {rows}")


def _check_padding(pad_id: int | None, tokens: Any, folder: Path) -> None:
    """transformers finds the token that a reward is read at by its id: the last one that does not pad."""
    if pad_id is None:
        raise InputError(
            f"{folder} has no pad_token_id, by which transformers finds an answer's last token; give --pad-token "
            f"TOKEN, {_that_pad(tokens)}"
        )
    if pad_id == tokens.eos_token_id:
        raise InputError(
            f"{folder} pads with its end token: transformers reads its rewards before the end, fledge at it, which is "
            "not the same model. Where it was trained to be read at the end, say so by --pad-token TOKEN, "
            f"{_that_pad(tokens)}"
        )


def _pad_with(token: str, model: Any, tokens: Any, folder: Path) -> None:
    """Let ``token`` pad: one that stands in no text, or a new one where the embedding has a row that is no token's."""
    known, rows = tokens.get_vocab(), len(model.get_input_embeddings().weight)
    if token in known:
        fits, why = token in _free(tokens), "is a piece of texts, or begins or ends them"
    else:
        fits, why = max(known.values()) + 1 < rows, "is no token of it, and its embedding has no row left for a new one"
    if not fits:
        raise InputError(f"--pad-token: {token!r} does not fit {folder}: it {why}; give {_that_pad(tokens)}")
    tokens.add_special_tokens({"pad_token": token})
    model.config.get_text_config().pad_token_id = tokens.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokens.pad_token_id


def _free(tokens: Any) -> list[str]:
    """Tokens of the vocabulary that may pad: special ones that neither begin nor end a text, and bytes of no text."""
    from fledge.data import tokenizer

    special = [tokens.convert_ids_to_tokens(i) for i in tokenizer.special_ids(tokens)]
    known = tokens.get_vocab()
    names = [name for byte in reversed(NEVER_IN_UTF8) for name in (f"<0x{byte:02X}>", chr(byte)) if name in known]
    whole = [name for name in names if tokens.decode([known[name]]) == "\ufffd"]  # else it is that character
    return [name for name in special if name not in (tokens.bos_token, tokens.eos_token)] + whole


def _that_pad(tokens: Any) -> str:
    some = ", ".join(map(repr, _free(tokens)[:4]))
    return "a token that stands in no text" + (f", such as {some}" if some else "")


def _preprocessing(kind: str, model: Any, tokens: Any) -> dict[str, Any]:
    from fledge.data import tokenizer
    from fledge.models import reward_model

    sizes = getattr(model.config, "text_config", model.config)
    length = getattr(sizes, "max_position_embeddings", None)
    found = {"tokenizer": tokenizer.digest(tokens)} | ({"max_length": length} if length else {})
    return found | ({"template": reward_model.template({}, tokens)} if kind in CONVERSES else {})


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
