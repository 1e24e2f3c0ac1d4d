"""The bundled tokenizer and the prompt table."""
from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, models, normalizers

from vlarl.envs.tabletop.spec import TASKS, VARIATIONS, sentences
from vlarl.policies.families import LLAMA_BLANK
from vlarl.policies.layout import read_config, resolve_folder
from vlarl.policies.make_tiny import TEXT_LIMIT, train_tokenizer
from vlarl.policies.tokenizer import TEMPLATE, PromptTable, load_tokenizer

FOLDER = resolve_folder("scratch:tiny")[0]
CONFIG = read_config(FOLDER)


def table(tokenizer: Tokenizer) -> PromptTable:
    return PromptTable(tokenizer, CONFIG.bos_id, CONFIG.pad_id, CONFIG.blank_id, torch.device("cpu"))


def test_ids_stay_below_the_action_tokens_and_prompts_are_short() -> None:
    tokenizer = load_tokenizer(FOLDER)
    prompts = table(tokenizer)
    assert tokenizer.get_vocab_size() < TEXT_LIMIT == CONFIG.action_low
    train = [len(prompts.tokenize(s)) for s in sentences(TASKS, "train")]
    assert max(train) <= 10
    assert max(len(prompts.tokenize(s)) for v in VARIATIONS for s in sentences(TASKS, v)) <= 16


def test_prompt_text_and_frame() -> None:
    tokenizer = load_tokenizer(FOLDER)
    ids = table(tokenizer).tokenize("Put the RED cube on the green plate")
    assert (ids[0], ids[-1]) == (CONFIG.bos_id, CONFIG.blank_id) == (1, tokenizer.token_to_id("▁"))
    text = "In: What action should the robot take to put the red cube on the green plate?\nOut:"
    assert tokenizer.decode(ids[1:-1]) == text == TEMPLATE.format("put the red cube on the green plate")
    assert tokenizer.decode(tokenizer.encode("Größe 7 \U0001f916", add_special_tokens=False).ids) == "Größe 7 \U0001f916"


def test_padding_lies_between_bos_and_text() -> None:
    prompts = table(load_tokenizer(FOLDER))
    short, long = "touch the red cube", "put the red cube on the green plate"
    a, b = prompts.tokenize(short), prompts.tokenize(long)
    batch = prompts.batch((short, long, short))
    gap = len(b) - len(a)
    assert batch.ids_BL.tolist() == [[1, *[CONFIG.pad_id] * gap, *a[1:]], b, [1, *[CONFIG.pad_id] * gap, *a[1:]]]
    assert batch.mask_BL is not None
    assert batch.mask_BL.tolist()[0] == [True, *[False] * gap, *[True] * (len(a) - 1)]
    assert batch.mask_BL[1].all()
    alone = prompts.batch((short, short))
    assert alone.mask_BL is None
    assert alone.ids_BL.tolist() == [a, a]


def test_a_sentence_is_tokenised_once() -> None:
    asked = list[str]()

    class Counting:
        """Tokenizers cannot be patched: they are not Python's."""

        def encode(self, text: str, add_special_tokens: bool) -> object:
            asked.append(text)
            return load_tokenizer(FOLDER).encode(text, add_special_tokens=add_special_tokens)

    prompts = table(Counting())  # type: ignore[arg-type]
    first = prompts.batch(("touch the red cube", "push the blue cube left", "touch the red cube"))
    prompts.batch(("push the blue cube left",))
    again = prompts.batch(("touch the red cube", "push the blue cube left", "touch the can"))
    assert asked == [TEMPLATE.format(s) for s in ("touch the red cube", "push the blue cube left", "touch the can")]
    assert again.ids_BL[:2].tolist() == first.ids_BL[:2].tolist()


def test_prompts_can_have_few_lengths() -> None:
    prompts = table(load_tokenizer(FOLDER))
    alone, padded = prompts.batch(("touch the red cube",)), prompts.batch(("touch the red cube",), multiple=32)
    length = alone.ids_BL.shape[1]
    assert padded.ids_BL.tolist() == [[1, *[CONFIG.pad_id] * (32 - length), *alone.ids_BL[0, 1:].tolist()]]
    assert padded.mask_BL is not None
    assert padded.mask_BL.tolist() == [[True, *[False] * (32 - length), *[True] * (length - 1)]]


def test_bundled_tokenizer_is_the_reproducible_one() -> None:
    assert train_tokenizer().get_vocab() == load_tokenizer(FOLDER).get_vocab()


# Pieces of Llama's vocabulary with their real ids, and the merges that make them.
PIECES = {"▁In": 512, ":": 29901, "▁What": 1724, "▁action": 3158, "▁should": 881, "▁the": 278, "▁robot": 19964, "▁take": 2125, "▁to": 304}
PIECES |= {"▁pick": 5839, "▁up": 701, "▁black": 4628, "▁bow": 12580, "l": 29880, "?": 29973, "<0x0A>": 13, "Out": 3744, "▁": 29871}
# As published: "pick up the black bowl" with Llama 2's tokenizer, the lone blank appended.
BOWL = [1, 512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304, 5839, 701, 278, 4628, 12580, 29880, 29973, 13, 3744, 29901, 29871]


def llama_like(prefix_space: bool) -> Tokenizer:
    """A BPE in SentencePiece's manner: blanks are letters, one is put in front, bytes stand for what has no letter."""
    letters = sorted({c for piece in PIECES if not piece.startswith("<") for c in piece})
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | PIECES
    filler = iter(range(20000, 29000))  # ids of no meaning for what only lies between a letter and a piece
    vocab |= {c: next(filler) for c in letters if c not in vocab}
    merges = []
    for piece in (p for p in PIECES if not p.startswith("<")):
        for end in range(1, len(piece)):
            if (piece[:end], piece[end]) not in merges:
                merges.append((piece[:end], piece[end]))
            if piece[: end + 1] not in vocab:
                vocab[piece[: end + 1]] = next(filler)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    first = [normalizers.Prepend("▁")] if prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    return tokenizer


def llama_table(tokenizer: Tokenizer) -> PromptTable:
    return PromptTable(tokenizer, 1, 32000, LLAMA_BLANK, torch.device("cpu"))


def test_the_lone_blank_is_appended_where_the_vocabulary_leaves_it_out() -> None:
    tokenizer = llama_like(prefix_space=True)
    prompt = TEMPLATE.format("pick up the black bowl")
    assert tokenizer.encode(prompt, add_special_tokens=False).ids == BOWL[1:-1]
    # With a blank at the end the text has the lone one itself, and no second one follows.
    assert tokenizer.encode(prompt + " ", add_special_tokens=False).ids == BOWL[1:]
    assert llama_table(tokenizer).tokenize("Pick up the BLACK bowl") == BOWL
    ending = llama_like(prefix_space=True)
    ending.normalizer = normalizers.Sequence([ending.normalizer, normalizers.Replace(Regex(r":$"), ":▁")])
    assert ending.encode(prompt, add_special_tokens=False).ids == BOWL[1:]
    assert llama_table(ending).tokenize("pick up the black bowl") == BOWL


def test_llama_prompts_of_unequal_length_share_a_batch() -> None:
    batch = llama_table(llama_like(prefix_space=True)).batch(("pick up the black bowl", "pick up the bowl"))
    assert batch.ids_BL.tolist() == [BOWL, [1, 32000, *BOWL[1:13], *BOWL[14:]]]
    assert batch.mask_BL is not None
    assert batch.mask_BL.tolist() == [[True] * 21, [True, False, *[True] * 19]]


def test_a_prompt_without_the_blank_in_front_is_another() -> None:
    """SentencePiece puts it there; tokenizers made without it would show here."""
    ids = llama_table(llama_like(prefix_space=False)).tokenize("pick up the black bowl")
    assert ids[-len(BOWL) + 2 :] == BOWL[2:]
    assert ids[1] != BOWL[1]
