"""From a request body to engine requests: limits, draws, seeds, sampling parameters.

Order of choices: prompt i, completion j is index i * n + j and draws with seed + j. So equal requests give equal
answers whatever else is in the batch, and the n completions of a prompt differ. With best_of there are so many draws
for each prompt, of which n become choices.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from service.api.openai.conversation import NamedTool
from service.api.openai.formats import forced_calls, grammar_of, shown_tools
from service.api.openai.prompts import Prompt, TokenIds, check_token_ids, encode, encode_chat, prompts_of
from service.api.openai.requests import INT64, ChatBody, CompletionBody, SamplingBody
from service.api.openai.tools import CallReader, ForcedCalls, TaggedCalls
from service.auth import Caller
from service.engine.types import GenerationRequest, Grammar, SamplingParams
from service.errors import BadRequest, ContextTooLong, Forbidden
from service.registry.served import ServedModel

DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class View:
    """What an answer shows besides text.

    Attributes:
        echo: begin with the prompt.
        logprobs: how many of the most probable tokens beside each; None for no log probabilities.
        prompt_logprobs: the same for the prompt, in vLLM's form.
        token_ids: of prompt and completion.
        read_calls: makes the reader of a choice's tool calls; None if there can be none.
    """

    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    token_ids: bool = False
    read_calls: Callable[[], CallReader] | None = None

    @property
    def scores_prompt(self) -> int | None:
        """How many of the most probable tokens the engine must tell at each place of the prompt."""
        echoed = self.logprobs if self.echo else None
        return max((wish for wish in (echoed, self.prompt_logprobs) if wish is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a body asks for, ready for the engine.

    Attributes:
        requests: one per draw; draw j of prompt i is i * draws + j.
        prompts: each once.
        draws: completions generated per prompt.
        n: completions returned per prompt.
        view: what the answer shows.
    """

    requests: tuple[GenerationRequest, ...]
    prompts: tuple[Prompt, ...]
    draws: int
    n: int
    view: View

    @property
    def most_tokens(self) -> int:
        """What it costs at most: each prompt once, and all that may be generated."""
        prompts = sum(len(prompt.token_ids) for prompt in self.prompts)
        return prompts + sum(request.sampling.max_tokens for request in self.requests)

    def on_behalf_of(self, caller: Caller) -> "Plan":
        """Return the plan with its requests in the caller's name.

        Raises:
            Forbidden: they would overtake more than the key may.
        """
        priority = self.requests[0].priority
        if caller.min_priority is not None and priority < caller.min_priority:
            raise Forbidden(
                f"this key may not ask for a priority below {caller.min_priority}, and {priority} was asked for",
                param="priority",
            )
        return replace(self, requests=tuple(replace(request, caller=caller.id) for request in self.requests))


def plan_completion(body: CompletionBody, max_choices: int, model: ServedModel, request_id: str) -> Plan:
    """Read a completion body; may take long, so not for the event loop.

    Raises:
        BadRequest: a token id the model does not have, an empty prompt, too many choices, or a grammar that is none.
        ContextTooLong: a prompt, with what it asks for, does not fit.
    """
    given = prompts_of(body.prompt, model)
    draws = body.best_of or body.n or 1
    _check_choices(len(given) * draws, max_choices, "n" if body.best_of is None else "best_of")
    prompts = tuple(
        encode(
            prompt,
            model,
            add_special_tokens=body.add_special_tokens is not False,
            keep=_kept(body, model),
            echo=bool(body.echo),
        )
        for prompt in given
    )
    view = View(
        echo=bool(body.echo),
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_logprobs,
        token_ids=bool(body.return_token_ids),
    )
    wanted = [_room(prompt.token_ids, body, DEFAULT_COMPLETION_TOKENS, model, "prompt") for prompt in prompts]
    return _plan(body, request_id, prompts, wanted, draws, view, grammar_of(body), model)


def plan_chat(body: ChatBody, max_choices: int, model: ServedModel, request_id: str) -> Plan:
    """Read a chat body; may take long, so not for the event loop.

    Raises:
        BadRequest: the model has no chat template, the template refuses the conversation, or a grammar is none.
        ContextTooLong: the conversation, with what it asks for, does not fit.
    """
    draws = body.n or 1
    _check_choices(draws, max_choices, "n")
    tools = shown_tools(body)
    grammar = grammar_of(body)
    if tools and grammar is not None:
        raise BadRequest(
            "tools cannot be called in a text with a form of its own; set tool_choice to none, or leave out "
            "response_format and structured_outputs",
            param="response_format" if body.structured_outputs is None else "structured_outputs",
        )
    token_ids = encode_chat(
        body.messages, body, model, add_special_tokens=bool(body.add_special_tokens), shows_tools=bool(tools)
    )
    keep = _kept(body, model)
    prompt = Prompt(token_ids=token_ids if keep is None else token_ids[-keep:])
    view = View(
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        token_ids=bool(body.return_token_ids),
        read_calls=_reader_of(body) if tools else None,
    )
    wanted = _room(prompt.token_ids, body, model.engine.info.max_model_len, model, "messages")
    return _plan(body, request_id, (prompt,), [wanted], draws, view, grammar or forced_calls(body), model)


def _reader_of(body: ChatBody) -> Callable[[], CallReader]:
    """How tool calls stand in the text: between tags if the model is free, alone if they are forced."""
    if isinstance(body.tool_choice, NamedTool):
        return partial(ForcedCalls, body.tool_choice.function.name)
    if body.tool_choice == "required":
        return partial(ForcedCalls, None)
    return partial(TaggedCalls, only_one=body.parallel_tool_calls is False)


def _kept(body: SamplingBody, model: ServedModel) -> int | None:
    """Return how many of a prompt's tokens to keep; None for all."""
    keep = body.truncate_prompt_tokens
    if keep == -1:
        return max(1, model.engine.info.max_model_len - max(1, body.wished_tokens or 1))
    return keep


def _room(token_ids: TokenIds, body: SamplingBody, default: int, model: ServedModel, param: str) -> int:
    """Return how many tokens to generate. An explicit wish must fit; a default is cut to what fits.

    Raises:
        ContextTooLong: it does not fit.
    """
    explicit = body.wished_tokens
    limit = model.engine.info.max_model_len
    room = limit - len(token_ids)
    if room < (1 if explicit is None else explicit):
        wish = f" and {explicit} were asked for" if explicit is not None else ""
        raise ContextTooLong(
            f"this model's maximum context length is {limit} tokens; {param} has {len(token_ids)}{wish}", param=param
        )
    wanted = min(default, room) if explicit is None else explicit
    if body.min_tokens is not None and body.min_tokens > wanted:
        raise BadRequest(
            f"min_tokens is {body.min_tokens}, more than the {wanted} tokens that may be generated", param="min_tokens"
        )
    return wanted


def _check_choices(num_choices: int, max_choices: int, param: str) -> None:
    if num_choices > max_choices:
        raise BadRequest(
            f"{num_choices} completions in one request are too many; this server allows {max_choices}", param=param
        )


def _plan(  # noqa: PLR0913  (one caller per endpoint, and each part is its own)
    body: SamplingBody,
    request_id: str,
    prompts: tuple[Prompt, ...],
    wanted: list[int],
    draws: int,
    view: View,
    grammar: Grammar | None,
    model: ServedModel,
) -> Plan:
    """Make one engine request per draw."""
    check_token_ids(list(body.logit_bias or ()), model, "logit_bias")
    check_token_ids(body.stop_token_ids or [], model, "stop_token_ids")
    if view.echo or view.logprobs is not None or view.prompt_logprobs is not None:
        _ = model.vocabulary  # made here, in the tokenizer thread
    ranks = draws > (body.n or 1)
    requests = tuple(
        GenerationRequest(
            request_id=f"{request_id}-{index * draws + draw}",
            prompt_token_ids=prompt.token_ids,
            sampling=_sampling(body, wanted[index], draw, view, grammar, ranks=ranks),
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            group=f"{request_id}-prompt-{index}" if draws > 1 else "",
            group_size=draws,
        )
        for index, prompt in enumerate(prompts)
        for draw in range(draws)
    )
    return Plan(requests=requests, prompts=prompts, draws=draws, n=body.n or 1, view=view)


def _sampling(
    body: SamplingBody, max_tokens: int, draw: int, view: View, grammar: Grammar | None, *, ranks: bool
) -> SamplingParams:
    """The sampling parameters of one draw; `ranks` if draws are compared, which needs their log probabilities."""
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    if top_p == 0:  # a nucleus without mass holds the likeliest token alone
        temperature, top_p = 0.0, 1.0
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=tuple((body.logit_bias or {}).items()),
        min_tokens=body.min_tokens or 0,
        seed=None if body.seed is None else (body.seed + draw) % INT64,
        stop=tuple(body.stop),
        include_stop=bool(body.include_stop_str_in_output),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=0 if ranks and view.logprobs is None else view.logprobs,
        prompt_logprobs=view.scores_prompt,
        grammar=grammar,
    )
