"""Engines: from chats to text. Plain Python: no Ray, no HTTP, no config.

Shapes: B sequences still generating, T positions so far, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from ray_jobs.core.models import resolve_model
from ray_jobs.core.storage import local_folder

if TYPE_CHECKING:
    import torch

Prompt = list[dict[str, str]] | str
"""A chat, `[{"role": ..., "content": ...}]`, or text that the model continues as it is."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Completion(NamedTuple):
    """What a model made of one prompt: `completion_tokens` counts generated tokens, the end token among them."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


class PromptTooLong(ValueError):
    """The prompt leaves no room for an answer in the model's context."""


class ChatRefused(ValueError):
    """The model's chat template takes no such chat: roles that must alternate, a system message it does not know."""


class Engine(Protocol):
    """One loaded model. Both methods may be called from several threads."""

    def generate(self, chats: Sequence[Prompt], *, max_new_tokens: int, sampling_temperature: float, seed: int) -> list[Completion]:
        """Return one completion a prompt, in order, generated as one batch."""

    def stream(self, chat: Prompt, *, max_new_tokens: int, sampling_temperature: float, seed: int) -> Iterator[str | Completion]:
        """Yield pieces of text as they come, then the whole completion; closing the iterator stops the work."""


def open_engine(
    model: str, *, adapter: str | None = None, dtype: str = "auto", device: str = "auto", num_threads: int | None = None
) -> "TransformersEngine":
    """Return an engine of a model by its name, fetched to this machine where it is elsewhere.

    Args:
        model: as `resolve_model` takes it: a built-in name, a folder, a GGUF file, a URI or a hub id.
        adapter: path or URI of the adapter folder to merge.

    Raises:
        ModelError: nothing usable under that name.
    """
    folder = str(resolve_model(model))
    merged = str(local_folder(adapter)) if adapter else None
    return TransformersEngine(folder, adapter=merged, dtype=dtype, device=device, num_threads=num_threads)


def unsent(text: str, sent: str) -> str:
    """Return what of `text` can go out after `sent`: nothing while its last character lacks tokens."""
    return "" if text.endswith(REPLACEMENT) else text[len(sent) :]


class TransformersEngine:
    """A Hugging Face model as an engine: left-padded batches that shrink as rows finish.

    Args:
        folder: model folder with its tokenizer.
        adapter: folder of a PEFT adapter, merged into the weights at load.
        dtype: "auto" (bfloat16 where the device computes in it), "float32", "bfloat16" or "float16".
        device: "auto" (a GPU where torch sees one), "cpu" or "cuda".
        num_threads: torch threads of this process; None leaves torch's choice.
    """

    def __init__(
        self, folder: str, *, adapter: str | None = None, dtype: str = "auto", device: str = "auto", num_threads: int | None = None
    ):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        if num_threads:
            torch.set_num_threads(num_threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype(dtype, device), attn_implementation="sdpa")
        if adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        self.model = model.to(device).eval()
        self.context_tokens: int = model.config.max_position_embeddings
        self._end_tokens = torch.tensor(_end_tokens(model, self.tokenizer), device=device)

    def generate(
        self, chats: Sequence[Prompt], *, max_new_tokens: int, sampling_temperature: float = 0.0, seed: int = 0
    ) -> list[Completion]:
        """Return one completion a prompt, in order, generated as one batch.

        Args:
            max_new_tokens: most tokens of one answer; the model's context may end it earlier.
            sampling_temperature: 0 takes the likeliest token.
            seed: of the sampling, for the batch as a whole.

        Raises:
            PromptTooLong: a prompt fills the context.
            ChatRefused: the chat template takes no such chat.
        """
        if not chats:
            return []
        encoded = self._encode(chats)
        lengths = encoded["attention_mask"].sum(dim=1).tolist()
        tokens: list[list[int]] = [[] for _ in chats]
        for rows, new in self._decode(encoded, max_new_tokens, sampling_temperature, seed):
            for row, token in zip(rows, new, strict=True):
                tokens[row].append(token)
        return [self._completion(row, length) for row, length in zip(tokens, lengths, strict=True)]

    def stream(self, chat: Prompt, *, max_new_tokens: int, sampling_temperature: float = 0.0, seed: int = 0) -> Iterator[str | Completion]:
        """Yield pieces of text as they come, then the whole completion; closing the iterator stops the work.

        Args and errors are those of `generate`.
        """
        encoded = self._encode([chat])
        tokens: list[int] = []
        sent = ""
        for _, new in self._decode(encoded, max_new_tokens, sampling_temperature, seed):
            tokens += new
            piece = unsent(self._text(tokens), sent)
            if piece:
                yield piece
                sent += piece
        completion = self._completion(tokens, encoded["input_ids"].shape[1])
        if completion.text != sent:
            yield completion.text[len(sent) :]
        yield completion

    def _encode(self, chats: Sequence[Prompt]) -> dict[str, "torch.Tensor"]:
        prompts = [chat if isinstance(chat, str) else self._render(chat) for chat in chats]
        add_special = [isinstance(chat, str) for chat in chats]
        ids = [self.tokenizer(text, add_special_tokens=add).input_ids for text, add in zip(prompts, add_special, strict=True)]
        longest = max(map(len, ids))
        if longest >= self.context_tokens:
            raise PromptTooLong(f"the prompt has {longest} tokens and the model's context {self.context_tokens}: shorten it")
        return self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)

    def _render(self, chat: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise ChatRefused(f"the model's chat template refuses these messages: {error}") from None

    def _decode(
        self, encoded: dict[str, "torch.Tensor"], max_new_tokens: int, temperature: float, seed: int
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield for each step the rows still generating and the token of each; a finished row leaves the batch."""
        import torch
        from transformers import DynamicCache

        ids_BT, mask_BT = encoded["input_ids"], encoded["attention_mask"]
        generator = torch.Generator(device=ids_BT.device).manual_seed(seed)
        cache = DynamicCache(config=self.model.config)
        rows = torch.arange(len(ids_BT), device=ids_BT.device)
        positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
        for _ in range(min(max_new_tokens, self.context_tokens - ids_BT.shape[1])):
            with torch.inference_mode():
                output = self.model(
                    input_ids=ids_BT,
                    attention_mask=mask_BT,
                    position_ids=positions_BT,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                new_B = _choose(output.logits[:, -1], temperature, generator)
            yield rows.tolist(), new_B.tolist()
            live = ~torch.isin(new_B, self._end_tokens)
            if not live.any():
                return
            if not live.all():
                kept = live.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                rows, new_B, mask_BT, positions_BT = rows[kept], new_B[kept], mask_BT[kept], positions_BT[kept]
            ids_BT, positions_BT = new_B[:, None], positions_BT[:, -1:] + 1
            mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=1)

    def _completion(self, tokens: list[int], prompt_tokens: int) -> Completion:
        ended = bool(tokens) and tokens[-1] in self._end_tokens.tolist()
        return Completion(self._text(tokens), "stop" if ended else "length", prompt_tokens, len(tokens))

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _choose(logits_BV: "torch.Tensor", temperature: float, generator: "torch.Generator") -> "torch.Tensor":
    import torch

    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    weights_BV = torch.softmax(logits_BV.float() / temperature, dim=-1)
    return torch.multinomial(weights_BV, 1, generator=generator)[:, 0]


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*listed, tokenizer.eos_token_id) if token is not None})


def _dtype(name: str, device: str) -> "torch.dtype":
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
