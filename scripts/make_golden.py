#!/usr/bin/env python3
"""Writes tests/golden: small random checkpoints and what transformers computes from them, in float32 on the CPU.

    pip install 'pjengine[golden]'
    scripts/make_golden.py tests/golden
    scripts/make_golden.py tests/golden --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf --minilm all-minilm-l6-v2/

Each folder tests/golden/NAME holds a golden.safetensors; those of the random models also a checkpoint (config.json and
model.safetensors, bfloat16). Only outputs are kept of the two real models. Nothing here imports pjengine.

golden.safetensors of
- a random decoder: `tokens` int32 [T] of ragged sequences with borders `starts` int32 [R + 1]; `logits` [T, vocab];
- a random embedder: `tokens`, `starts`, `hidden` [T, hidden_size]; where there are two token types also `token_types`
  int32 [T];
- a random classifier: `tokens`, `starts`, `logits` [R, labels]; `token_types` as above;
- `sentence-transformer`, `cross-encoder`, `reranker`, whole directories as sentence-transformers saves them, float32:
  `embeddings` of texts (row i of the first half with the default prompt, of the second with none) or `scores` of the
  pairs of a query with texts; the metadata's `texts` and `query` hold them as JSON;
- SmolLM2: `tokens`, `starts` of 8 chat prompts, each with its greedy continuation of 64 tokens, end-of-text ignored;
  `prompt_lens` [8]. Of the logits [8, 64, vocab] that chose the continuations, too big to keep whole: a fixed random
  subset of the vocabulary, `columns` [512] and `logits` [8, 64, 512]; `logsumexp` [8, 64]; the highest two, `top_ids`
  and `top_logits` [8, 64, 2]. The metadata's `messages` holds the chats as JSON;
- MiniLM: `embeddings` [32, 384] by sentence-transformers and `tokens`, `starts` as it cut them; the metadata's `texts`
  holds the texts as JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    Gemma3TextConfig,
    GteConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    NomicBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE: dict[str, Any] = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
TIED_LLAMA: dict[str, Any] = {
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
    "num_key_value_heads": 1,
}
ROBERTA: dict[str, Any] = {
    **SHAPE,
    "max_position_embeddings": 258,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
}
DISTILBERT: dict[str, Any] = {
    "vocab_size": 256,
    "dim": 64,
    "hidden_dim": 160,
    "n_layers": 3,
    "n_heads": 4,
    "max_position_embeddings": 256,
}
MODERNBERT: dict[str, Any] = {
    "local_attention": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
GEMMA3: dict[str, Any] = {
    "use_bidirectional_attention": True,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
QWEN2_WINDOWS: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}

# Grouped, multi-query and multi-head attention; scaled rotary; windows on all layers and on some: each in one of them.
RANDOM_GENERATORS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2, rope_parameters=LLAMA3_ROPE),
    "llama-tied": LlamaConfig(**SHAPE, **TIED_LLAMA, rope_parameters=LINEAR_ROPE),
    "qwen2": Qwen2Config(**SHAPE, **QWEN2_WINDOWS, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, num_key_value_heads=4, head_dim=32),
    "mistral": MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=8),
}
RANDOM_EMBEDDERS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SHAPE),
    "roberta": RobertaConfig(**ROBERTA),
    "xlm-roberta": XLMRobertaConfig(**{**ROBERTA, "num_attention_heads": 8}),
    "distilbert": DistilBertConfig(**DISTILBERT),
    "modernbert": ModernBertConfig(**SHAPE, **MODERNBERT),
    "mpnet": MPNetConfig(**{**SHAPE, "max_position_embeddings": 258}),
    "nomic_bert": NomicBertConfig(**SHAPE),
    "gte": GteConfig(**SHAPE, type_vocab_size=2),
    "gemma3_text": Gemma3TextConfig(**SHAPE, **GEMMA3),
    "qwen3-embedding": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
}
# Smaller: their encoders are those of above.
HEADED: dict[str, Any] = {**SHAPE, "vocab_size": 128, "num_hidden_layers": 2}
RANDOM_CLASSIFIERS: dict[str, PreTrainedConfig] = {
    "bert-classifier": BertConfig(**HEADED, num_labels=1),
    "roberta-classifier": RobertaConfig(**{**ROBERTA, **HEADED}, num_labels=3),
    "xlm-roberta-classifier": XLMRobertaConfig(**{**ROBERTA, **HEADED}, num_labels=1),
    "mpnet-classifier": MPNetConfig(**{**HEADED, "max_position_embeddings": 258}, num_labels=1),
    "distilbert-classifier": DistilBertConfig(**{**DISTILBERT, "vocab_size": 128, "n_layers": 2}, num_labels=2),
    "modernbert-classifier": ModernBertConfig(
        **HEADED, **MODERNBERT, num_labels=1, classifier_pooling="mean", classifier_bias=True
    ),
    "gte-classifier": GteConfig(**HEADED, num_labels=1),
    "qwen3-classifier": Qwen3Config(**HEADED, num_key_value_heads=2, head_dim=16, num_labels=1, pad_token_id=None),
}
LENGTHS = (1, 7, 40, 19, 64)

CHATS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain how a bicycle stays upright.",
    "List the planets of the solar system, the largest first.",
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
    "Translate to Spanish: Where is the nearest train station?",
    "Tell me a story about a dragon who is afraid of fire.",
    "Why is the sky blue? Answer for a child, then for a physicist.",
)
CONTINUATION = 64
COLUMNS = 512

TEXTS = (
    "",
    " ",
    ".",
    "a",
    "cat",
    "The cat sits on the mat.",
    "A feline rests on a rug.",
    "Stock markets fell sharply on Monday.",
    "How do I reset my password?",
    "To reset your password, open Settings and choose Security.",
    "Ｆｕｌｌｗｉｄｔｈ ｌｅｔｔｅｒｓ",
    "naïve café, façade, Ångström, coöperate",
    "Größe, Straße, Übermut",
    "Привет, мир! Как дела?",
    "こんにちは世界、元気ですか。",
    "你好，世界。今天天气很好。",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "안녕하세요 세계",
    "🙂🚀🔥 emoji 👩‍👩‍👧‍👦 family",
    "e\u0301 against \u00e9: combining marks",
    "line one\nline two\ttabbed\r\nline three",
    "def add(a, b):\n    return a + b",
    "SELECT name FROM users WHERE id = 42;",
    "https://example.org/path?query=1&other=two#fragment",
    "3.14159 26535 89793 23846 26433",
    "UPPER lower MiXeD CASE",
    "unbelievableantidisestablishmentarianismwordwithoutspaces" * 3,
    "zero\u200bwidth\u200bspace and a\u00a0no-break space",
    "A paragraph that is longer than the window of the model, so that its end is cut off. " * 40,
    "".join(f"{i} bottles of beer on the wall, " for i in range(99, 0, -1)),
)


def write_random_model(
    config: PreTrainedConfig,
    architecture: type[AutoModel | AutoModelForCausalLM | AutoModelForSequenceClassification],
    folder: Path,
    rope_frequencies: torch.Tensor | None = None,
) -> None:
    """One checkpoint with weights that make every part of the model matter, and its float32 outputs.

    rope_frequencies: radians per position, in place of the config's.
    """
    config.dtype = "bfloat16"
    if architecture is AutoModelForCausalLM:
        config.pad_token_id = None
    model = architecture.from_config(config)
    randomise(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    # Read back: the cast above also rounded the rotary frequencies.
    model = architecture.from_pretrained(folder, dtype=torch.float32).eval()
    if rope_frequencies is not None:
        model.rotary_emb.inv_freq = rope_frequencies
    # These give padding no position.
    first = config.pad_token_id + 1 if "roberta" in config.model_type or config.model_type == "mpnet" else 0
    lengths = (*LENGTHS[:-1], 140) if config.model_type == "mpnet" else LENGTHS  # its positions differ up to 91 apart
    tokens = [torch.randint(first, config.vocab_size, (length,)) for length in lengths]
    golden = {"tokens": torch.cat(tokens).int(), "starts": borders(tokens)}
    segments: list[dict[str, torch.Tensor]] = [{} for _ in tokens]
    if getattr(config, "type_vocab_size", 0) == 2:
        types = [torch.arange(length) * 2 // length for length in lengths]
        golden["token_types"] = torch.cat(types).int()
        segments = [{"token_type_ids": s[None]} for s in types]
    outputs = [model(t[None], **s) for t, s in zip(tokens, segments, strict=True)]
    if architecture is AutoModel:
        golden["hidden"] = torch.cat([output.last_hidden_state[0] for output in outputs])
    elif architecture is AutoModelForSequenceClassification:
        golden["logits"] = torch.cat([output.logits for output in outputs])
    else:
        golden["logits"] = torch.cat([output.logits[0] for output in outputs])
    save_file(golden, folder / "golden.safetensors")


def write_new(folder: Path) -> None:
    """GTE as its authors' code saves it, whose model_type is "new", with the rotation that their "ntk" scaling makes.

    That code is no part of transformers, which has the same model as "gte": this is its reference, its checkpoint
    renamed, its rotation computed here: base times factor, frequencies over factor ** (2 / head_dim).
    """
    theta, factor, size = 160000.0, 2.0, SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    frequencies = (theta * factor) ** (-torch.arange(0, size, 2) / size) / factor ** (2 / size)
    write_random_model(GteConfig(**SHAPE), AutoModel, folder, frequencies)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"model_type": "new", "architectures": ["NewModel"], "rope_theta": theta, "pack_qkv": True}
    config |= {"rope_scaling": {"type": "ntk", "factor": factor}, "position_embedding_type": "rope"}
    config |= {"layer_norm_type": "layer_norm", "logn_attention_scale": False, "unpad_inputs": True}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = load_file(folder / "model.safetensors")
    save_file({f"new.{name}": weight for name, weight in weights.items()}, folder / "model.safetensors")


TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
SHORT_TEXTS = ("a", "red apples", "how is the sea made?", "it's: the end.", "fruit fruit fruit fruit")
QUERY = "which fruit is red?"
RERANKER_TEMPLATE = (
    "<|im_start|>judge {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "<document>: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}<|im_end|>\n"
)


def write_sentence_transformer(folder: Path) -> None:
    """An embedder with every module that may stand behind the encoder, and a default prompt."""
    modules = [
        Transformer(_save_tiny(BertConfig(**TINY, vocab_size=96), AutoModel, word_pieces())),
        Pooling(32, "weightedmean"),
        Dense(32, 48, activation_function=torch.nn.Tanh()),
        Dense(48, 24, bias=False, activation_function=torch.nn.Identity()),
        Normalize(),
    ]
    prompts = {"query": "find: ", "document": ""}
    model = SentenceTransformer(modules=modules, prompts=prompts, default_prompt_name="query")
    embeddings = torch.cat(
        [model.encode(list(SHORT_TEXTS), convert_to_tensor=True, prompt_name=name) for name in (None, "document")]
    )
    _save_with_golden(model, folder, {"embeddings": embeddings}, texts=SHORT_TEXTS)


def write_cross_encoder(folder: Path) -> None:
    """A BERT that reads pairs with their segments."""
    path = _save_tiny(
        BertConfig(**TINY, vocab_size=96, num_labels=1), AutoModelForSequenceClassification, word_pieces()
    )
    _write_scores(CrossEncoder(path), folder)


def write_reranker(folder: Path) -> None:
    """A decoder that scores by the logits of yes and no, behind a chat template with the roles query and document."""
    tokenizer = byte_level()
    config = Qwen3Config(**TINY, vocab_size=272, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True)
    config.pad_token_id = tokenizer.pad_token_id
    transformer = Transformer(
        _save_tiny(config, AutoModelForCausalLM, tokenizer),
        transformer_task="text-generation",
        modality_config={
            "text": {"method": "forward", "method_output_name": "logits"},
            "message": {"method": "forward", "method_output_name": "logits", "format": "flat"},
        },
        module_output_name="causal_logits",
    )
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    modules = [transformer, LogitScore(yes, no)]
    _write_scores(CrossEncoder(modules=modules, num_labels=1, activation_fn=torch.nn.Identity()), folder)


def _write_scores(model: CrossEncoder, folder: Path) -> None:
    scores = torch.stack([model.predict([(QUERY, text)], convert_to_tensor=True)[0] for text in SHORT_TEXTS])
    _save_with_golden(model, folder, {"scores": scores}, texts=SHORT_TEXTS, query=QUERY)


def _save_tiny(config: PreTrainedConfig, architecture: Any, tokenizer: PreTrainedTokenizerFast) -> str:
    """Where a random model lies with its tokenizer."""
    path = tempfile.mkdtemp()
    model = architecture.from_config(config)
    randomise(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _save_with_golden(model: Any, folder: Path, golden: dict[str, torch.Tensor], **metadata: Any) -> None:
    model.save_pretrained(str(folder), create_model_card=False)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file(
        {name: tensor.float().contiguous() for name, tensor in golden.items()},
        folder / "golden.safetensors",
        metadata={name: json.dumps(value) for name, value in metadata.items()},
    )


def word_pieces() -> PreTrainedTokenizerFast:
    """A letter is a piece; texts and pairs are wrapped as BERT's."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *string.ascii_lowercase, *string.punctuation]
    pieces += [f"##{letter}" for letter in string.ascii_lowercase]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=48,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def byte_level() -> PreTrainedTokenizerFast:
    """A byte is a token, and so are yes and no."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("y", "e"), ("ye", "s"), ("n", "o")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(merge) for merge in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=RERANKER_TEMPLATE,
        model_max_length=64,
    )


def randomise(model: PreTrainedModel) -> None:
    """Matrices that keep a vector's length, norms about 1, biases about 0."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            std = 1.0 if "embed" in name else 1 / math.sqrt(weight.shape[1])
            weight.data.normal_(0, std)
        elif name.endswith("bias"):
            weight.data.normal_(0, 0.2)
        else:  # Gemma's norms add 1 to their weights
            weight.data.normal_(0 if model.config.model_type == "gemma3_text" else 1, 0.2)


def write_smollm2(gguf: Path, folder: Path) -> None:
    """Greedy continuations of CHATS and the logits that chose them."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    messages = [[{"role": "user", "content": text}] for text in CHATS]
    prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in messages]
    sequences, chosen = [], []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        for _ in range(CONTINUATION):  # the whole sequence each time: no cache whose order of sums would differ
            tokens = torch.cat([tokens, model(tokens, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        sequences.append(tokens[0])
        chosen.append(model(tokens).logits[0, len(prompt) - 1 : -1])
    logits = torch.stack(chosen)
    columns = torch.randperm(logits.shape[-1])[:COLUMNS].sort().values
    top = logits.topk(2)
    golden = {
        "tokens": torch.cat(sequences).int(),
        "starts": borders(sequences),
        "prompt_lens": torch.tensor([len(p) for p in prompts]).int(),
        "columns": columns.int(),
        "logits": logits[:, :, columns].contiguous(),
        "logsumexp": logits.logsumexp(-1),
        "top_ids": top.indices.int(),
        "top_logits": top.values,
    }
    save_file(golden, folder / "golden.safetensors", metadata={"messages": json.dumps(messages)})


def write_minilm(source: Path, folder: Path) -> None:
    """Embeddings of TEXTS as sentence-transformers makes them: cut at its max_seq_length, mean pooling, unit length."""
    model = SentenceTransformer(str(source), device="cpu")
    embeddings = [model.encode(text, convert_to_tensor=True) for text in TEXTS]
    tokens = [model.preprocess([text])["input_ids"][0] for text in TEXTS]
    golden = {"embeddings": torch.stack(embeddings), "tokens": torch.cat(tokens).int(), "starts": borders(tokens)}
    save_file(golden, folder / "golden.safetensors", metadata={"texts": json.dumps(TEXTS)})


def borders(sequences: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([0, *(len(s) for s in sequences)]).cumsum(0).int()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write, tests/golden")
    parser.add_argument("--smollm2", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf; left alone without it")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the folders to write; all without it")
    parser.add_argument("--minilm", type=Path, help="the folder of all-MiniLM-L6-v2; left alone without it")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)

    writers: dict[str, Callable[[Path], None]] = {}
    for architecture, configs in (
        (AutoModelForCausalLM, RANDOM_GENERATORS),
        (AutoModel, RANDOM_EMBEDDERS),
        (AutoModelForSequenceClassification, RANDOM_CLASSIFIERS),
    ):
        for name, config in configs.items():
            writers[name] = functools.partial(write_random_model, config, architecture)
    writers["new"] = write_new
    writers["sentence-transformer"] = write_sentence_transformer
    writers["cross-encoder"] = write_cross_encoder
    writers["reranker"] = write_reranker
    if arguments.smollm2:
        writers["smollm2-135m-instruct"] = functools.partial(write_smollm2, arguments.smollm2)
    if arguments.minilm:
        writers["all-minilm-l6-v2"] = functools.partial(write_minilm, arguments.minilm)
    for name, write in writers.items():
        if arguments.only and name not in arguments.only:
            continue
        torch.manual_seed(0)
        folder = arguments.out / name
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{folder}: {size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
