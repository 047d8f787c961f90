"""Watch what a pipeline's tokenizers read of the prompts: what they cut off, and what they were never given."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from dma_diffusers.pipelines.load import arguments


class TokenWatch:
    """The texts that the tokenizers of one pipeline call are given, and those that they read in part."""

    def __init__(self, pipe: DiffusionPipeline, prompts: Sequence[str], call: Mapping[str, Any]):
        """Begin without any text.

        Args:
            call: keyword arguments of the pipeline's call.
        """
        negative = call.get("negative_prompt")
        self.pipe, self.prompts, self.call = pipe, prompts, call
        self.negative_prompt = negative if isinstance(negative, str) else None
        self.tokenizers = dict(_tokenizers(pipe))
        self._texts: dict[str, set[str]] = defaultdict(set)
        self._cuts: list[dict[str, None]] = [{} for _ in prompts]

    @property
    def cuts(self) -> list[list[str]]:
        """Return for each prompt what was cut off it, one line for each tokenizer that did."""
        return [list(of_prompt) for of_prompt in self._cuts]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See each call of the pipeline's tokenizers; those inside of processors are among them."""
        stock = {name: type(tokenizer) for name, tokenizer in self.tokenizers.items()}
        try:
            for name, tokenizer in self.tokenizers.items():
                # The type of an object is what Python looks a call up in.
                object.__setattr__(tokenizer, "__class__", _watched(stock[name], name, self))
            yield
        finally:
            for name, tokenizer in self.tokenizers.items():
                object.__setattr__(tokenizer, "__class__", stock[name])

    def check_negative_prompt(self) -> None:
        """Raise ValueError if there is a negative prompt, and no tokenizer was given any text but the prompts.

        Texts are counted, because pipelines clean them and put them into templates.
        """
        if not self.negative_prompt or self.negative_prompt in self.prompts or not self._texts:
            return
        if any(len(texts) > len(set(self.prompts)) for texts in self._texts.values()):
            return
        kind, known = type(self.pipe).__name__, arguments(type(self.pipe))
        scale = next((name for name in ("true_cfg_scale", "guidance_scale") if name in known), None)
        if scale is None:
            raise ValueError(f"{kind} does not read negative_prompt: leave it out")
        value = self.call.get(scale, known[scale].default)
        raise ValueError(
            f"{kind} does not read negative_prompt where {scale} is {value}: raise that above 1, or leave it out"
        )

    def saw(
        self, name: str, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], options: Mapping[str, Any]
    ) -> None:
        """Take note of one call of a tokenizer, which the pipeline has under this name."""
        self._texts[name].update(texts)
        if not options.get("truncation"):
            return  # pipelines read the whole text, too, to warn of what they cut
        most = options.get("max_length") or tokenizer.model_max_length
        special = options.get("add_special_tokens", True)
        for number, text in enumerate(texts):
            tokens, kept = _count(tokenizer, text, special), most
            if tokens <= most and len(texts) == len(self.prompts):
                tokens, kept = self._beyond_limit(tokenizer, self.prompts[number], most)
            if tokens > kept:
                is_negative = self.negative_prompt and self.negative_prompt.strip() in text
                what = "negative prompt" if is_negative else "prompt"
                cut = f"the {what} was truncated: {name} read the first {kept} of {tokens} tokens"
                for of_prompt in self._cuts if len(texts) != len(self.prompts) else [self._cuts[number]]:
                    of_prompt[cut] = None

    def _beyond_limit(self, tokenizer: PreTrainedTokenizerBase, prompt: str, most: int) -> tuple[int, int]:
        """Return a prompt's tokens, and how many of them the pipeline keeps.

        Qwen-Image's keeps fewer than its only tokenizer reads. Where there are several, the limit is of one of them.
        """
        default = arguments(type(self.pipe)).get("max_sequence_length")
        limit = self.call.get("max_sequence_length", default and default.default)
        if len(self.tokenizers) > 1 or not limit or most <= limit:
            return 0, 0
        return _count(tokenizer, prompt, special=False), limit


def _count(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> int:
    return len(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)


def _tokenizers(pipe: DiffusionPipeline) -> Iterator[tuple[str, PreTrainedTokenizerBase]]:
    seen = set()
    for name, component in pipe.components.items():
        tokenizer = component
        if not isinstance(component, PreTrainedTokenizerBase):
            tokenizer = getattr(component, "tokenizer", None)
        if isinstance(tokenizer, PreTrainedTokenizerBase) and id(tokenizer) not in seen:
            seen.add(id(tokenizer))
            yield name, tokenizer


def _watched(kind: type, name: str, watch: TokenWatch) -> type:
    """Make a class of tokenizers like `kind`, whose calls `watch` sees."""

    def call(self: Any, *given: Any, **options: Any) -> Any:
        read = kind.__call__(self, *given, **options)
        text = given[0] if given else options.get("text")
        texts = [text] if isinstance(text, str) else text
        if isinstance(texts, list | tuple) and all(isinstance(each, str) for each in texts):
            object.__setattr__(self, "__class__", kind)  # what the watch reads itself is not to be seen
            try:
                watch.saw(name, self, texts, options)
            finally:
                object.__setattr__(self, "__class__", watched)
        return read

    watched = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    return watched
