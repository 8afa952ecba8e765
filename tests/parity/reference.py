"""The reference: `transformers` in float32 on the CPU, with weights dequantised by the test itself."""

from pathlib import Path

import numpy as np

from tests.parity.cases import Case, dequantised, prompts, stored_tensors, write_checkpoint

NEW_TOKENS = 64


def reference_model(case: Case, folder: Path):
    """`AutoModelForCausalLM` of a case's weights in float32, and the same folder's MTP module if there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    config = {key: value for key, value in case.config.items() if key != "quantization_config"}
    write_checkpoint(folder, config | {"torch_dtype": "float32"}, dequantised(stored_tensors(case)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Its batched expert kernels sum in another order than one expert after the other does.
    model.set_experts_implementation("eager")
    model.eval()
    return model


def reference_logits(model, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """float32 [B, T, V], each row run alone and without padding; zeros beyond a row's length."""
    import torch

    out = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
    with torch.no_grad():
        for row, length in enumerate(lengths):
            ids = torch.from_numpy(tokens[row : row + 1, :length].astype(np.int64))
            out[row, :length] = model(ids).logits[0].numpy()
    return out


def reference_greedy(model, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, float]:
    """64 greedy tokens of each row, int32 [B, 64], and the smallest lead of a best token, in std of the logits."""
    import torch

    out = np.zeros((len(tokens), NEW_TOKENS), np.int32)
    margin = np.inf
    with torch.no_grad():
        for row, length in enumerate(lengths):
            ids = torch.from_numpy(tokens[row : row + 1, :length].astype(np.int64))
            cache = None
            for step in range(NEW_TOKENS):
                result = model(ids, past_key_values=cache, use_cache=True)
                cache, logits = result.past_key_values, result.logits[0, -1].numpy()
                best = np.sort(logits)[-2:]
                margin = min(margin, (best[1] - best[0]) / logits.std())
                out[row, step] = int(logits.argmax())
                ids = torch.tensor([[int(out[row, step])]])
    return out, float(margin)


def reference_mtp_logits(model, tokens: np.ndarray, lengths: np.ndarray, hidden: str) -> np.ndarray:
    """MTP logits, float32 [B, T, V]: position t joins the hidden state of t and token t + 1; the last one is zero."""
    import torch
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    # transformers knows the number of the released models' MTP layer only.
    layers = model.config.num_hidden_layers
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layers}\..*"]
    mtp = MtpModel.from_pretrained(model).eval()
    before_norm = []
    model.model.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    out = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
    with torch.no_grad():
        for row, length in enumerate(lengths):
            if length < 2:
                continue
            ids = torch.from_numpy(tokens[row : row + 1, :length].astype(np.int64))
            after_norm = model.model(ids).last_hidden_state
            states = (after_norm if hidden == "post" else before_norm[-1])[:, :-1]
            positions = torch.arange(1, int(length))[None]
            drafted = mtp.forward_layer(
                0, states, positions, MtpCache(config=mtp.config), input_ids=ids[:, 1:]
            )
            out[row, : length - 1] = mtp._project_to_logits(drafted)[0].numpy()
    return out


def reference_arrays(case: Case, folder: Path) -> dict[str, np.ndarray]:
    """All that a golden file holds. Raises AssertionError where a greedy choice is too close to compare."""
    tokens, lengths = prompts(case)
    model = reference_model(case, folder)
    logits = reference_logits(model, tokens, lengths)
    greedy, margin = reference_greedy(model, tokens, lengths)
    # Twenty times what the logits differ by in fact: else take another seed.
    assert margin > 2e-4, f"{case.name}: greedy lead of {margin:.1e} std; another seed is needed"
    arrays = {"logits": logits, "greedy": greedy}
    if case.config["num_nextn_predict_layers"]:
        for hidden in ("post", "pre"):
            arrays[f"mtp_{hidden}"] = reference_mtp_logits(model, tokens, lengths, hidden)
    return arrays
