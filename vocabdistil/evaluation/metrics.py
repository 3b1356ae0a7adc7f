"""What ``metrics.json`` of a student's folder says: every key, its type and its meaning.

:class:`TrimMetrics` is that of :func:`vocabdistil.trim`, and :class:`DraftMetrics` where it made a draft head,
:class:`DistillMetrics` that of :func:`vocabdistil.distill`, and :class:`CausalMetrics` of a decoder. A key that is
``NotRequired`` is there if what it says applies; every other one is always there. A new key needs its line here: a test
compares the files of both commands with these types.
"""

# Annotations stay what they are instead of strings: TypedDict looks into them for NotRequired.
from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

__all__ = [
    "Architecture",
    "CausalBits",
    "CausalMetrics",
    "CoverageFigures",
    "DistillMetrics",
    "DraftFigures",
    "DraftMetrics",
    "HeldOutFigures",
    "Initialisation",
    "LoyaltyFigures",
    "MethodFigures",
    "ModelFigures",
    "Models",
    "NextTokenFigures",
    "StartKinds",
    "TokenStarts",
    "TrimMetrics",
    "VocabularyOrigin",
]


class StartKinds(TypedDict):
    """By kind of start, how many tokens or which share of a text's.

    Attributes:
        shared: as the teacher's own token.
        role: as the teacher's special or added token of the same role or string.
        composed: as a mean of the teacher's pieces.
        none: as noise.
    """

    shared: float
    role: float
    composed: float
    none: float


class TokenStarts(TypedDict):
    """What the student's tokens began as.

    Attributes:
        tokens: how many of each kind.
        text: the share of the text's tokens of each kind, from 0 to 1.
    """

    tokens: StartKinds
    text: NotRequired[StartKinds]


class Initialisation(TypedDict, total=False):
    """How the student began.

    Attributes:
        tokens: what its tokens began as.
        copied_layers: the teacher's layers that its own came from, counted from 0; empty for fresh ones.
        explained: where layers were fitted: of each, the share of the teacher's variance that it explains.
        embedding: with a preset: ``"copied"`` or ``"projected"``.
        positions: with a preset: how many positions are the teacher's.
        head: with a preset: whether the MLM head is the teacher's.
        checkpoint: the folder that the run went on from, and then nothing else.
    """

    tokens: TokenStarts
    copied_layers: list[int]
    explained: list[float]
    embedding: str
    positions: int
    head: bool
    checkpoint: str


Architecture = TypedDict(
    "Architecture",
    {
        "class": str,
        "layers": NotRequired[int | None],
        "dim": NotRequired[int | None],
        "heads": NotRequired[int | None],
        "ffn": NotRequired[int | None],
    },
)
Architecture.__doc__ = """The student's class and shape.

Attributes:
    class: of ``transformers``.
    layers, dim, heads, ffn: transformer layers, hidden width, attention heads, width of the feed-forward layers; left
        out for a class that the table of architectures does not have.
"""


class VocabularyOrigin(TypedDict):
    """Where the student's vocabulary came from.

    Attributes:
        source: ``"train"``, ``"trim"``, or the folder or name of a tokenizer.
        notes: what was said when it was made.
    """

    source: str
    notes: list[str]


class ModelFigures(TypedDict):
    """One model in numbers.

    Attributes:
        parameters: tied ones once.
        vocab: tokens of its tokenizer.
        mb: 10^6 bytes of its weights.
        seconds: of one forward pass of the body on the CPU, the median of three.
        tokens: that this pass read, padding left out.
    """

    parameters: int
    vocab: int
    mb: float
    seconds: float
    tokens: int


class Models(TypedDict):
    """Teacher and student beside each other, on the same text.

    Attributes:
        teacher, student: their numbers; the first teacher's.
        time_batch, time_length: texts of the timed pass, and their tokens at most.
        threads: CPU threads of torch.
        compression: how many times smaller the student is, in bytes.
        speedup: how many times faster.
    """

    teacher: ModelFigures
    student: ModelFigures
    time_batch: int
    time_length: int
    threads: int
    compression: float
    speedup: float


class MethodFigures(TypedDict):
    """What one alignment covers: :class:`vocabdistil.Coverage`, whose attributes and properties have these names.

    Attributes:
        pairs, one_to_one_pairs: span pairs; those with one token on each side.
        teacher_tokens, student_tokens: tokens of the texts.
        teacher_unaligned, student_unaligned: those in no pair.
        teacher_unknown, student_unknown: unknown ones.
        teacher_examples, student_examples: ``[token, count]`` of the most frequent ones in no pair, five at most.
        matched_vocabulary: tokens that both vocabularies have.
        text_bytes, covered_bytes: bytes of the texts without white space; those inside a pair; None if not counted.
        one_to_one: share of the pairs with one token on each side.
        teacher_covered, student_covered: share of the tokens in pairs.
        teacher_one_to_one, student_one_to_one: share of the tokens in such pairs of one and one.
        teacher_span, student_span: mean tokens of a pair.
        teacher_unknown_rate, student_unknown_rate: share of unknown tokens.
        covered_text: share of the bytes inside a pair; None if not counted.
    """

    pairs: int
    one_to_one_pairs: int
    teacher_tokens: int
    student_tokens: int
    teacher_unaligned: int
    student_unaligned: int
    teacher_unknown: int
    student_unknown: int
    teacher_examples: list[list[Any]]
    student_examples: list[list[Any]]
    matched_vocabulary: int
    text_bytes: int | None
    covered_bytes: int | None
    one_to_one: float
    teacher_covered: float
    student_covered: float
    teacher_one_to_one: float
    student_one_to_one: float
    teacher_span: float
    student_span: float
    teacher_unknown_rate: float
    student_unknown_rate: float
    covered_text: float | None


class CoverageFigures(TypedDict):
    """How the vocabularies of a teacher and the student correspond on a text: :class:`vocabdistil.CoverageReport`.

    Attributes:
        teacher_vocab, student_vocab, matched_vocab: tokens of each vocabulary, and of both.
        texts: how many were read.
        teacher_tokens, student_tokens: their tokens.
        pieces_per_token: student tokens for a teacher token under ``reduce``; None without.
        unk_rate_reduce, unk_rate_own, unk_rate_teacher: share of unknown tokens of the student under ``reduce`` (None
            without), by its own tokenizer, and of the teacher.
        matched_tokens: share of the teacher's tokens that the student has too.
        reduce_equals_own: share of the texts that ``reduce`` cuts as the student's tokenizer does; None without.
        methods: by alignment what it covers.
    """

    teacher_vocab: int
    student_vocab: int
    matched_vocab: int
    texts: int
    teacher_tokens: int
    student_tokens: int
    pieces_per_token: float | None
    unk_rate_reduce: float | None
    unk_rate_own: float
    unk_rate_teacher: float
    matched_tokens: float
    reduce_equals_own: float | None
    methods: dict[str, MethodFigures]


class LoyaltyFigures(TypedDict):
    """How a student agrees with its teacher.

    Attributes:
        pearson, spearman: correlation of the cosine similarities of all pairs of texts.
        cosine: mean cosine of both vectors of a text; left out where they differ in width.
        logits_kl, label, probability: with MLM heads, of the same words hidden from both: KL of the distributions over
            the matched vocabulary in nats, share of equal guesses, 1 - Jensen-Shannon distance.
    """

    pearson: float
    spearman: float
    cosine: NotRequired[float]
    logits_kl: NotRequired[float]
    label: NotRequired[float]
    probability: NotRequired[float]


class NextTokenFigures(TypedDict):
    """How a student that is a decoder follows its teacher: :func:`vocabdistil.evaluation.next_tokens.compare_decoders`.

    Attributes:
        agreement: share of the places at which both expect the same of the matched tokens most.
        next_token_kl: of the student's distribution over these from the teacher's, in nats.
        kept_probability: what the teacher gives to them.
        places: ends of tokens that both have read; without any, what is above is left out.
        bits_per_byte, teacher_bits_per_byte: on the same texts, :func:`vocabdistil.bits_per_byte`.
    """

    agreement: NotRequired[float]
    next_token_kl: NotRequired[float]
    kept_probability: NotRequired[float]
    places: int
    bits_per_byte: float
    teacher_bits_per_byte: float


class HeldOutFigures(TypedDict):
    """A student on held-out text.

    Attributes:
        kl_own, kl_reduce: span KL to the teachers, of the student's own tokenization and of the ``reduce`` rows.
        mlm, masked_accuracy: loss and share of right guesses at its own hidden tokens.
        pseudo_perplexity: per character.
        cosine: mean cosine of the projected vectors of texts with the first teacher's.
        pearson, spearman, logits_kl, label, probability: as in :class:`LoyaltyFigures`.
        dev: Spearman's correlation on the dev pairs.
    """

    kl_own: float
    kl_reduce: NotRequired[float]
    mlm: NotRequired[float]
    masked_accuracy: NotRequired[float]
    pseudo_perplexity: NotRequired[float]
    cosine: float
    pearson: float
    spearman: float
    logits_kl: NotRequired[float]
    label: NotRequired[float]
    probability: NotRequired[float]
    dev: NotRequired[float]


class _Metrics(TypedDict):
    teacher: list[str]
    settings: dict[str, Any]
    vocabulary: VocabularyOrigin | None
    whitened: dict[str, float]
    prompt: str
    sentence_transformers: bool
    architecture: Architecture
    initialisation: Initialisation
    coverage: list[CoverageFigures]
    models: Models
    files: list[str]
    baselines: NotRequired[dict[str, dict[str, float]]]
    warnings: NotRequired[list[str]]


class TrimMetrics(_Metrics):
    """``metrics.json`` of :func:`vocabdistil.trim`.

    Attributes:
        teacher: its name or folder, in a list of one.
        command: ``"trim"``.
        settings: every option by its name, but for the text.
        texts: how many texts were read.
        text: SHA-256 of them.
        compared_texts: those of them that coverage and agreement were counted on.
        vocabulary: where the student's came from.
        whitened: if the teacher's vectors were whitened: by its name how much of the variance of the hidden states that
            its last layer was to give it explains.
        prompt: what stands before every text, or nothing.
        sentence_transformers: whether the folder is one of sentence-transformers.
        architecture: the student's.
        initialisation: how it began.
        coverage: how the vocabularies correspond.
        loyalty: of an encoder: by ``"N layers"`` or ``"1 layer"`` the agreement with the teacher; where layers were
            left out or made narrower also ``"all layers"``: before that.
        next_tokens: of a decoder: its agreement with the teacher.
        models: sizes and times.
        files: those of the folder, by which a later run knows what it may replace.
        baselines: by name, what others reach on the same measures.
        warnings: what the user should know before using the student.
    """

    command: Literal["trim"]
    texts: int
    text: str
    compared_texts: int
    loyalty: NotRequired[dict[str, LoyaltyFigures]]
    next_tokens: NotRequired[NextTokenFigures]


class DraftFigures(TypedDict):
    """What a draft head holds of its target.

    Attributes:
        tokens, target_tokens: that it predicts, and of the target's tokenizer.
        covered: the share of the tokens of held-out text that are among its own, from 0 to 1.
        mb, target_mb: 10^6 bytes of its weight and of the target's output layer.
    """

    tokens: int
    target_tokens: int
    covered: float
    mb: float
    target_mb: float


class DraftMetrics(TypedDict):
    """``metrics.json`` of a draft head.

    Attributes:
        teacher, command, settings, texts, text, prompt, files: as in :class:`TrimMetrics`.
        held_out_texts: texts that were not counted.
        draft: the head.
    """

    teacher: list[str]
    command: Literal["trim"]
    settings: dict[str, Any]
    texts: int
    text: str
    held_out_texts: int
    prompt: str
    draft: DraftFigures
    files: list[str]


class DistillMetrics(_Metrics):
    """``metrics.json`` of :func:`vocabdistil.distill`.

    Attributes:
        teacher: names or folders of all teachers.
        command: ``"distill"``.
        settings: every option by its name, but for the text.
        vocabulary: where the student's came from; None for a checkpoint's.
        whitened: as in :class:`TrimMetrics`, of each teacher that was.
        prompt: what stands before every text, or nothing.
        sentence_transformers: whether the folder is one of sentence-transformers.
        architecture: the student's.
        initialisation: how it began.
        steps: of the training.
        train_texts, held_out_texts: texts trained on, texts that the figures were counted on.
        max_length: tokens of a text that the teachers read.
        seed: of everything random.
        logits: where output distributions were learned: ``match reduce reduce-map none``.
        teacher_scales: by teacher and layer assignment, what its hidden states were divided by.
        coverage: by teacher, how the vocabularies correspond on held-out text.
        before, after: the student on held-out text, untrained and trained.
        teacher_pseudo_perplexity: by teacher, per character; None without an MLM head.
        train_seconds: of the training.
        models: sizes and times.
        files: those of the folder, by which a later run knows what it may replace.
        baselines: by name, what others reach on the same held-out text, and their parameters; none where the minutes
            that the job may take were over before.
        warnings: what the user should know before using the student.
        recipe: the name of the recipe that settings came from.
        lr: the peak learning rate.
        best_step: the step that the student comes from: of the lowest held-out loss at a checkpoint.
        checkups: what was seen at step 0 and at every checkpoint: ``step``, ``loss`` (on other held-out
            text than the figures), ``dev`` (Spearman's correlation on the dev pairs) if there are any.
        mixed: by the share of the trained weights, the rest being those of the start: Spearman's correlation with the
            teacher's of the similarities of texts and the same without some words; the best is the student. Empty
            where the student is as trained.
        share: of the trained weights in the student.
    """

    command: Literal["distill"]
    steps: int
    train_texts: int
    held_out_texts: int
    max_length: int
    seed: int
    logits: str
    teacher_scales: list[list[float]]
    before: HeldOutFigures
    after: HeldOutFigures
    teacher_pseudo_perplexity: list[float | None]
    train_seconds: float
    recipe: str
    lr: float
    best_step: int
    checkups: list[dict[str, float]]
    mixed: dict[str, float]
    share: float


class CausalBits(TypedDict):
    """Bits per byte of held-out text.

    Attributes:
        teacher: of the teacher.
        before, after: of the student, untaught and taught.
    """

    teacher: float
    before: float
    after: float


class CausalMetrics(TypedDict):
    """``metrics.json`` of :func:`vocabdistil.distill` of a decoder.

    Attributes:
        teacher: its name or folder, in a list of one.
        student: the folder that the run went on from.
        command: ``"distill"``.
        settings: every option by its name, but for the text.
        recipe, weights: its name, and what each loss counted.
        architecture: the student's class.
        steps, lr, best_step, train_texts, held_out_texts, seed, train_seconds, files: as in :class:`DistillMetrics`.
        checkups: what was seen at step 0 and at every checkpoint: ``step``, and as ``loss`` bits per byte, on other
            held-out text than the figures.
        max_length: tokens of a text that the teacher and the student read.
        coverage: how the vocabularies correspond on held-out text.
        bits_per_byte: what both are worth.
    """

    teacher: list[str]
    student: str
    command: Literal["distill"]
    settings: dict[str, Any]
    recipe: str
    weights: dict[str, float]
    architecture: str
    steps: int
    lr: float
    best_step: int
    checkups: list[dict[str, float]]
    train_texts: int
    held_out_texts: int
    max_length: list[int]
    seed: int
    coverage: CoverageFigures
    bits_per_byte: CausalBits
    train_seconds: float
    files: list[str]
