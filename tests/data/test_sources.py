"""The three views, of the reviews and of files."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from distrl.config import DataConfig
from distrl.data.errors import DataError
from distrl.data.reviews import Split, load_reviews, split_of
from distrl.data.sources import (
    load_comparisons,
    load_demonstrations,
    load_prompts,
    on_one_scale,
)

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def reviews(**fields: object) -> DataConfig:
    return DataConfig.model_validate(fields)


def config(path: object, **fields: object) -> DataConfig:
    return DataConfig.model_validate({"source": str(path), "max_prompt_tokens": 64} | fields)


REVIEWS = reviews()


def numbered(count: int) -> Iterable[dict[str, object]]:
    return ({"prompt": f"prompt {i}", "response": f" answer {i}"} for i in range(count))


# --- reviews


def test_review_splits_share_no_sentence() -> None:
    texts = [[d.response for d in load_demonstrations(REVIEWS, split)] for split in SPLITS]
    assert [len(t) for t in texts] == [8470, 1074, 1059]
    assert len({text for split in texts for text in split}) == len(load_reviews())


def test_review_demonstrations_have_no_prompt() -> None:
    rows = load_demonstrations(reviews(limit=5), "train")
    assert len(rows) == 5
    assert {row.prompt for row in rows} == {""}
    assert all(split_of(row.response) == "train" for row in rows)


def test_review_comparisons_are_groups_with_human_means() -> None:
    means = {r.text: r.mean for r in load_reviews()}
    groups = load_comparisons(REVIEWS, "validation", group=8, seed=3)
    assert [len(g.responses) for g in groups] == [8] * 134 + [2]
    for group in groups:
        assert group.ratings == tuple(means[text] for text in group.responses)
    texts = [text for g in groups for text in g.responses]
    assert len(set(texts)) == 1074


def test_review_comparisons_follow_the_seed() -> None:
    one, same, other = (load_comparisons(REVIEWS, "test", group=4, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


@pytest.mark.parametrize(("limit", "sizes"), [(10, [4, 4, 2]), (9, [4, 4]), (2, [2])])
def test_review_comparisons_within_a_limit(limit: int, sizes: list[int]) -> None:
    groups = load_comparisons(REVIEWS, "train", group=4, seed=0, limit=limit)
    assert [len(g.responses) for g in groups] == sizes


def test_a_single_response_is_no_comparison() -> None:
    with pytest.raises(DataError, match="no group of two responses"):
        load_comparisons(REVIEWS, "train", group=4, seed=0, limit=1)


def test_review_prompts_are_the_first_words(tokenizer: PreTrainedTokenizerFast) -> None:
    data = reviews(prompt_words=(2, 5), max_prompt_tokens=24)
    texts = {r.review_id: r.text for r in load_reviews()}
    rows = load_prompts(data, tokenizer, "test")
    assert 900 < len(rows) < 1059
    assert len({row.prompt_id for row in rows}) == len(rows)
    assert {len(row.text.split()) for row in rows} == {2, 3, 4, 5}
    for row in rows:
        assert texts[row.prompt_id].startswith(row.text + " ")
        assert row.token_ids[0] == tokenizer.bos_token_id
        assert len(row.token_ids) <= 24


def test_no_held_out_review_prompt_is_a_training_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    """A tenth of the held-out sentences open as a training sentence does; SFT and the reward
    model keep them, as the sentences differ."""
    train, *held_out = (
        load_prompts(reviews(max_prompt_tokens=24), tokenizer, split) for split in SPLITS
    )
    trained = {row.text for row in train}
    assert len(train) == 8215, "none of these is left out"
    assert [len(rows) for rows in held_out] == [946, 927]
    assert not trained & {row.text for rows in held_out for row in rows}
    for split, rows in zip(SPLITS[1:], held_out, strict=True):
        few = load_prompts(reviews(max_prompt_tokens=24, limit=40), tokenizer, split)
        assert 0 < len(few) < 40
        assert [r.prompt_id for r in few] == [r.prompt_id for r in rows[: len(few)]]


def test_prompt_and_rest_of_a_review_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    """The ids of a prompt begin the ids of the whole, so PPO goes on where SFT did."""
    texts = {r.review_id: r.text for r in load_reviews()}
    for row in load_prompts(reviews(max_prompt_tokens=24), tokenizer, "validation"):
        whole = tokenizer.encode(texts[row.prompt_id], add_special_tokens=False)
        prompt = row.token_ids[1:].tolist()
        assert whole[: len(prompt)] == prompt
        rest = whole[len(prompt) :]
        assert f"{row.text}{tokenizer.decode(rest)}" == texts[row.prompt_id]


def test_long_review_prompts_are_skipped(tokenizer: PreTrainedTokenizerFast) -> None:
    wide, narrow = (
        {row.prompt_id for row in load_prompts(reviews(max_prompt_tokens=m), tokenizer, "test")}
        for m in (24, 6)
    )
    assert narrow < wide
    with pytest.raises(DataError, match=r"max_prompt_tokens=1; raise the latter"):
        load_prompts(reviews(max_prompt_tokens=1), tokenizer, "test")
    with pytest.raises(DataError, match=r"raise the latter, or data\.limit=1"):
        load_prompts(reviews(max_prompt_tokens=1, limit=1), tokenizer, "test")


@pytest.mark.parametrize("words", [(0, 2), (3, 2)])
def test_impossible_prompt_words(
    words: tuple[int, int], tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=r"data\.prompt_words"):
        load_prompts(reviews(prompt_words=words), tokenizer, "test")


@pytest.mark.parametrize("fields", [{"chat": True}, {"validation": "rows.jsonl"}])
def test_reviews_take_neither_chat_nor_held_out_rows(fields: dict[str, object]) -> None:
    with pytest.raises(DataError, match=f"data.{next(iter(fields))} does not go"):
        load_demonstrations(reviews(**fields), "train")


# --- files


def test_file_splits_are_by_prompt_and_complete(write_rows) -> None:
    rows = list(numbered(300))
    path = write_rows(*rows, *rows[:50])
    splits = [load_demonstrations(config(path), split) for split in SPLITS]
    assert sum(map(len, splits)) == 350
    prompts = [{row.prompt for row in split} for split in splits]
    assert sum(map(len, prompts)) == 300
    assert len(splits[0]) > 220
    assert len(splits[1]) > 15


def test_the_same_chat_is_in_one_split_however_it_is_written(write_rows) -> None:
    rows = []
    for i, row in enumerate(numbered(200)):
        turn = {"role": "user", "content": row["prompt"], "id": i}
        rows += [row, row | {"prompt": [turn]}, row | {"prompt": [turn | {"id": -i}]}]
    path = write_rows(*rows)
    splits = [load_demonstrations(config(path, chat=True), split) for split in SPLITS]
    prompts = [{repr(row.prompt) for row in split} for split in splits]
    assert sum(map(len, splits)) == 600 and sum(map(len, prompts)) == 200


def test_a_plain_prompt_is_in_one_split_with_chat_and_without(write_rows) -> None:
    """So a run goes on with the rows that it held out, and two runs may share a reward model."""
    path = write_rows(*numbered(200))
    for split in SPLITS:
        plain, chat = (
            load_demonstrations(config(path, chat=chat), split) for chat in (False, True)
        )
        assert [row.row_id for row in plain] == [row.row_id for row in chat]


def test_file_splits_by_id_column(write_rows) -> None:
    path = write_rows(*({"id": i // 2, **row} for i, row in enumerate(numbered(200))))
    splits = [load_demonstrations(config(path, id_column="id"), split) for split in SPLITS]
    ids = [{row.row_id for row in split} for split in splits]
    assert sum(map(len, ids)) == len(set().union(*ids)) == 100


def test_naming_a_column_of_unique_ids_leaves_the_split_as_it_is_by_prompt(write_rows) -> None:
    """Several rows to one prompt, each with an id of its own: no prompt is in two splits."""
    rows = [{"id": f"row-{i}", **row} for i, row in enumerate([*numbered(200)] * 3)]
    path = write_rows(*rows)
    for split in SPLITS:
        plain, named = (
            load_demonstrations(config(path, id_column=name), split) for name in (None, "id")
        )
        assert [row.prompt for row in named] == [row.prompt for row in plain]


def test_neither_an_id_nor_a_prompt_is_in_two_splits(write_rows) -> None:
    """Prompts 3i to 3i + 2 hang together through the ids a-i and b-i, which share the middle."""
    rows = list(numbered(300))
    path = write_rows(
        *({"id": f"a-{i // 3}", **row} for i, row in enumerate(rows) if i % 3 < 2),
        *({"id": f"b-{i // 3}", **row} for i, row in enumerate(rows) if i % 3 > 0),
    )
    splits = [load_demonstrations(config(path, id_column="id"), split) for split in SPLITS]
    assert sum(map(len, splits)) == 400 and len(splits[0]) > 280 and all(splits)
    for name in ("row_id", "prompt"):
        values = [{getattr(row, name) for row in split} for split in splits]
        assert sum(map(len, values)) == len(set().union(*values))


def test_rows_without_prompts_are_split_by_id(write_rows) -> None:
    path = write_rows(*({"id": i // 2, **row} for i, row in enumerate(numbered(200))))
    for split in SPLITS:
        rows = load_demonstrations(config(path, id_column="id", prompt_column=""), split)
        assert {split_of(row.row_id) for row in rows} == {split}


def test_held_out_file(write_rows) -> None:
    data = config(
        write_rows(*numbered(20)),
        validation=str(write_rows({"prompt": "p", "response": "r"}, name="held.jsonl")),
    )
    assert len(load_demonstrations(data, "train")) == 20
    for split in ("validation", "test"):
        assert [row.prompt for row in load_demonstrations(data, split)] == ["p"]


def test_limit_is_of_the_split(write_rows) -> None:
    path = write_rows(*numbered(300))
    for split in SPLITS:
        whole = load_demonstrations(config(path), split)
        assert load_demonstrations(config(path, limit=3), split) == whole[:3]


def test_empty_split_is_an_error(write_rows) -> None:
    path = write_rows({"prompt": "p", "response": "r"})
    empty: Split = next(split for split in SPLITS if split != split_of("p"))
    with pytest.raises(DataError, match=f"no row of .* the {empty} split"):
        load_demonstrations(config(path), empty)


def test_rows_without_prompt_only_where_the_config_says_so(write_rows) -> None:
    path = write_rows({"text": "once"}, {"text": "upon"})
    fields = {"response_column": "text", "validation": str(path)}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no column 'prompt'.*: text"):
        load_demonstrations(config(path, **fields), "train")
    rows = load_demonstrations(config(path, prompt_column="", **fields), "train")
    assert [(row.row_id, row.prompt, row.response) for row in rows] == [
        ("1", "", "once"),
        ("2", "", "upon"),
    ]


def test_ratings_of_the_reviews_are_on_one_scale_and_those_of_a_file_are_not(write_rows) -> None:
    assert on_one_scale(REVIEWS)
    assert not on_one_scale(config(write_rows({})))


def test_file_comparisons(write_rows) -> None:
    path = write_rows(
        {"prompt": "p", "responses": ["a", "b", "c"], "ratings": [1, 2, 3]},
        {"prompt": "q", "responses": ["d", "e"], "ratings": [0.5, -1]},
    )
    data = config(path, validation=str(path))
    groups = load_comparisons(data, "train", group=8, seed=0)
    assert [(g.row_id, g.prompt, g.responses, g.ratings) for g in groups] == [
        ("1", "p", ("a", "b", "c"), (1.0, 2.0, 3.0)),
        ("2", "q", ("d", "e"), (0.5, -1.0)),
    ]
    assert load_comparisons(data, "train", group=8, seed=0, limit=4) == groups[:1]
    assert load_comparisons(data, "train", group=8, seed=0, limit=5) == groups
    with pytest.raises(DataError, match="within 2 responses"):
        load_comparisons(data, "train", group=8, seed=0, limit=2)


CHOSEN = {"chosen_column": "chosen", "rejected_column": "rejected"}


def said(*turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * 3
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def test_file_comparisons_of_a_chosen_and_a_rejected_response(write_rows) -> None:
    """As text, and as public sets have them: with the prompt once more, or without it."""
    path = write_rows(
        {"prompt": "p", "chosen": "a", "rejected": ""},
        {"prompt": "p", "chosen": said("p", "a"), "rejected": said("p", "b")},
        {"prompt": said("p", "q", "r"), "chosen": said("p", "q", "r", "a"), "rejected": "b"},
        {"prompt": said("p", "q", "r"), "chosen": said("", "a")[1:], "rejected": said("", "")[1:]},
    )
    data = config(path, validation=str(path), chat=True, **CHOSEN)
    groups = load_comparisons(data, "train", group=8, seed=0)
    assert [g.responses for g in groups] == [("a", ""), ("a", "b"), ("a", "b"), ("a", "")]
    assert {g.ratings for g in groups} == {(1.0, 0.0)}
    assert [g.prompt for g in groups] == [tuple(said("p"))] * 2 + [tuple(said("p", "q", "r"))] * 2
    plain = data.model_copy(update={"chat": False, "limit": 2})
    assert [g.prompt for g in load_comparisons(plain, "train", group=8, seed=0)] == ["p", "p"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (5, "'chosen' should be text or chat messages, found int 5"),
        (None, "'chosen' should be text or chat messages, found NoneType"),
        ([], "'chosen' has no messages"),
        (said("p", "a", "b"), "last message of column 'chosen' should be the assistant's"),
        (said("o", "k", "p", "a"), "3 messages before the response, and the prompt has 1"),
    ],
)
def test_bad_chosen_response_is_told_with_its_line(
    write_rows, chosen: object, message: str
) -> None:
    path = write_rows({"prompt": "p", "chosen": chosen, "rejected": "b"})
    data = config(path, validation=str(path), **CHOSEN)
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{message}"):
        load_comparisons(data, "train", group=8, seed=0)


def test_a_chat_that_ends_with_the_assistant_is_a_prompt_and_its_demonstration(
    write_rows, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows({"m": said("p", "a")}, {"m": said("p", "q", "r", "b")})
    data = config(path, validation=str(path), chat=True, prompt_column="m")
    asked = [tuple(said("p")), tuple(said("p", "q", "r"))]
    rows = load_demonstrations(data, "train")
    assert [(row.prompt, row.response) for row in rows] == list(zip(asked, "ab", strict=True))
    prompts = load_prompts(data, chat_tokenizer, "train")
    assert [row.meta["messages"] for row in prompts] == asked, "what is rolled out has no answer"
    write_rows({"m": said("p")})
    with pytest.raises(DataError, match="no column 'response'"):
        load_demonstrations(data, "train")
    write_rows({"m": said("p", "a"), "response": "b"})
    (row,) = load_demonstrations(data, "train")
    assert (row.prompt, row.response) == (tuple(said("p", "a")), "b")
    write_rows({"m": said("p", "a"), "responses": ["b", "c"], "ratings": [1, 0]})
    (group,) = load_comparisons(data, "train", group=8, seed=0)
    assert group.prompt == tuple(said("p", "a"))


def test_pairs_without_a_prompt_column_have_it_in_their_turns(write_rows) -> None:
    path = write_rows({"chosen": said("p", "a"), "rejected": said("p", "b")})
    data = config(path, validation=str(path), chat=True, prompt_column="chosen", **CHOSEN)
    (group,) = load_comparisons(data, "train", group=8, seed=0)
    assert (group.prompt, group.responses) == (tuple(said("p")), ("a", "b"))


def test_columns_that_pairs_have_are_known_by_name(write_rows) -> None:
    path = write_rows({"prompt": "p", "chosen": "a", "rejected": "b"})
    with pytest.raises(DataError, match=r"no column 'responses'; .*set data\.chosen_column=chosen"):
        load_comparisons(config(path, validation=str(path)), "train", group=8, seed=0)
    for name in CHOSEN:
        with pytest.raises(ValueError, match="go together; set both, or neither"):
            config(path, **{name: CHOSEN[name]})


def test_one_text_rated_differently_is_left_out_and_told_once(
    write_rows, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows(
        {"prompt": "p", "responses": ["a", "b"], "ratings": [1, 2]},
        {"prompt": "q", "responses": ["a", "a", "a"], "ratings": [1, 2, 2]},
        {"prompt": "r", "responses": ["a", "a"], "ratings": [1, 1]},
        {"prompt": "s", "responses": ["a", "a", "b"], "ratings": [1, 2, 2]},
        {"prompt": "t", "responses": ["c", "c"], "ratings": [1, 0]},
    )
    data = config(path, validation=str(path))
    for _ in range(2):
        groups = load_comparisons(data, "train", group=8, seed=0, limit=7)
        assert [g.row_id for g in groups] == ["1", "3", "4"]
    assert caplog.messages == [
        f"2 of the train rows (the first: {path}:2) left out of the comparisons: all their "
        "responses are one text, rated differently"
    ]
    path = write_rows({"prompt": "p", "chosen": "a", "rejected": "a"})
    data = config(path, validation=str(path), **CHOSEN)
    with pytest.raises(DataError, match="in all 1 train rows the responses are one text"):
        load_comparisons(data, "train", group=8, seed=0)


def test_bad_comparison_is_told_with_its_line(write_rows) -> None:
    good = {"prompt": "p", "responses": ["a", "b"], "ratings": [1, 2]}
    path = write_rows(good, good | {"ratings": [1]})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 1 numbers in 'ratings' for 2 responses"):
        load_comparisons(config(path, validation=str(path)), "train", group=8, seed=0)


def test_file_prompts_carry_their_further_columns(
    write_rows, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows({"prompt": "2 + 2 =", "answer": 4, "key": "k7"}, {"prompt": "x", "key": "k8"})
    data = config(path, validation=str(path), id_column="key")
    first, second = load_prompts(data, tokenizer, "train")
    assert (first.prompt_id, first.text, first.meta) == ("k7", "2 + 2 =", {"answer": 4})
    assert tokenizer.decode(first.token_ids) == "<|bos|>2 + 2 ="
    assert (second.prompt_id, second.meta) == ("k8", {})


def test_equal_prompts_are_kept_with_ids_of_their_own(
    write_rows, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows({"prompt": "p"}, {"prompt": "p"})
    rows = load_prompts(config(path, validation=str(path)), tokenizer, "train")
    assert [row.prompt_id for row in rows] == ["1", "2"]


def test_ids_must_be_ids_and_unique(write_rows, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows({"prompt": "p", "id": "a"}, {"prompt": "q", "id": "a"})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: id 'a' is taken by .*rows\.jsonl:1"):
        load_prompts(config(path, validation=str(path), id_column="id"), tokenizer, "train")
    path = write_rows({"prompt": "p", "id": None})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: column 'id' should be an id"):
        load_prompts(config(path, validation=str(path), id_column="id"), tokenizer, "train")


def test_long_file_prompt_is_an_error_with_line_length_and_fix(
    write_rows, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows({"prompt": "ok"}, {"prompt": "z" * 100})
    data = config(path, validation=str(path), max_prompt_tokens=12)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .* \d+ tokens.*is 12; raise it"):
        load_prompts(data, tokenizer, "train")
    fits = data.model_copy(update={"max_prompt_tokens": 101})  # a token a letter, and one ahead
    assert len(load_prompts(fits, tokenizer, "train")[1].token_ids) == 101


def test_no_prompt_column_no_prompts(write_rows, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"data\.prompt_column is empty"):
        load_prompts(config(write_rows({"a": 1}), prompt_column=""), tokenizer, "train")


def test_chat_prompts(write_rows, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "hi"}]
    path = write_rows({"prompt": messages, "response": "yes"}, {"prompt": "hi", "response": "no"})
    data = config(path, validation=str(path), chat=True)
    from_messages, from_text = load_prompts(data, chat_tokenizer, "train")
    assert from_messages.text == from_text.text == "<|bos|>user:hi<|eos|><|bos|>assistant:"
    assert from_messages.meta == {"response": "yes", "messages": tuple(messages)}
    assert [d.prompt for d in load_demonstrations(data, "train")] == [tuple(messages)] * 2


def test_chat_trouble_is_told_with_its_line(
    write_rows,
    tokenizer: PreTrainedTokenizerFast,
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = write_rows({"prompt": "hi"}, {"prompt": [{"role": "tool", "content": "x"}]})
    data = config(path, validation=str(path), chat=True)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*no chat template"):
        load_prompts(data, tokenizer, "train")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the chat template refuses"):
        load_prompts(data, chat_tokenizer, "train")


def test_a_prompt_of_no_tokens_is_told_with_its_line(
    write_rows, tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows({"prompt": "hi"}, {"prompt": "  "})
    mute, deaf = copy.deepcopy(chat_tokenizer), copy.deepcopy(tokenizer)
    mute.chat_template = "{{ messages[0].content | trim }}"
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the chat template makes nothing of"):
        load_prompts(config(path, validation=str(path), chat=True), mute, "train")
    deaf.bos_token = None
    deaf.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the tokenizer makes nothing of"):
        load_prompts(config(path, validation=str(path)), deaf, "train")
