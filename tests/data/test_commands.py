"""The data commands as a person types them."""

import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_eso.cli.data import app
from megatron_eso.cli.main import app as main_app
from megatron_eso.config.schema import (
    DataConfig,
    DataSourceConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_eso.data.fits import unseen_data
from megatron_eso.data.manifest import load_manifest, sha256_of
from megatron_eso.data.megatron_indexed import open_indexed
from megatron_eso.data.open_split import require_data
from megatron_eso.data.reader import RowReader, ValidationReader
from megatron_eso.data.tokenizer import Tokenizer
from megatron_eso.errors import DataError, UserError
from tests.data.conftest import write_corpus


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_prepare_says_what_it_made_and_that_there_is_nothing_to_do(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    arguments = ["prepare", tmp_path / "corpus.jsonl", "--out", tmp_path / "set",
                 "--sequence-length", 16, "--vocab-size", 300, "--processes", 1]  # fmt: skip
    assert "prepared" in run(*arguments)
    assert "nothing to do" in run(*arguments)


def test_files_that_are_left_out_are_part_of_the_request(prepared, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(9):
        write_corpus(tmp_path / f"in/part{number}.jsonl", num_documents=60)
    (tmp_path / "in/table.csv").write_text("a,b")
    words = ["prepare", tmp_path / "in", "--out", tmp_path / "set", "--sequence-length", 16,
             "--tokenizer", prepared / "tokenizer.json", "--processes", 1]  # fmt: skip
    with pytest.raises(
        DataError, match=r"table\.csv: \.csv files are not read; .*--exclude '\*\.csv'"
    ):
        run(*words)
    assert "prepared" in run(*words, "--exclude", "*.csv")
    assert "nothing to do" in run(*words, "--include", "*.jsonl")  # the same files
    with pytest.raises(DataError, match=r"another request \(files \(names and sizes\) differ\); "):
        run(*words, "--exclude", "*.csv", "--exclude", "part3.*")
    documents = load_manifest(tmp_path / "set/train").num_documents
    output = run(*words, "--exclude", "*.csv", "--exclude", "part3.*", "--overwrite")
    assert "prepared" in output and load_manifest(tmp_path / "set/train").num_documents < documents


def test_another_request_is_named_by_its_options_and_the_beginnings_of_hashes(
    prepared, corpus, tmp_path
):
    words = [
        "prepare",
        corpus,
        "--out",
        tmp_path / "set",
        "--sequence-length",
        16,
        "--processes",
        1,
    ]
    run(*words, "--vocab-size", 300)
    file = prepared / "tokenizer.json"
    with pytest.raises(DataError) as raised:
        run(*words, "--tokenizer", file, "--partition-mib", 2, "--compress")
    tokenizer = f"--tokenizer: trained on {256 << 20} bytes -> sha256 {sha256_of(file)[:12]}; "
    others = "--compress: False -> True; --partition-mib: not given -> 2); choose"
    assert f"from another request ({tokenizer}{others}" in str(raised.value)


def test_a_tokenizer_is_not_removed_with_the_output_that_it_lies_in(prepared, corpus, tmp_path):
    shutil.copytree(prepared, tmp_path / "set")
    words = ["prepare", corpus, "--out", tmp_path / "set", "--sequence-length", 16, "--overwrite"]
    for name in ("tokenizer.json", "."):
        with pytest.raises(DataError, match=r"set/?\S* lies in \S+/set, whose files this prepar"):
            run(*words, "--tokenizer", tmp_path / "set" / name)
    assert sha256_of(tmp_path / "set/tokenizer.json") == sha256_of(prepared / "tokenizer.json")


def test_a_vocabulary_that_no_tokenizer_can_have_is_refused_before_anything_is_written(
    corpus, tmp_path
):
    with pytest.raises(DataError, match="--vocab-size -5 is too small: 256 bytes"):
        run("prepare", corpus, "--out", tmp_path / "set", "--vocab-size", -5)
    assert not (tmp_path / "set").exists()


def test_a_source_that_is_missing_is_named_before_a_tokenizer_is_asked_for(corpus, tmp_path):
    with pytest.raises(DataError, match=r"source \S+/missing\.txt does not exist"):
        run("prepare", corpus, tmp_path / "missing.txt", "--out", tmp_path / "set")
    with pytest.raises(DataError, match="give --vocab-size to train a tokenizer"):
        run("prepare", corpus, "--out", tmp_path / "set")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--staging", "there"], "--staging there applies only to object stores"),
        (["--tokenizer-mib", 3], "--tokenizer-mib 3 applies only when a tokenizer is trained"),
    ],
)
def test_options_of_prepare_that_would_do_nothing_are_refused(
    prepared, corpus, tmp_path, words, message
):
    given = ["--tokenizer", prepared / "tokenizer.json"]
    with pytest.raises(DataError, match=message):
        run("prepare", corpus, "--out", tmp_path / "set", *given, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-rows", 3], "--max-rows 3 applies only to --picture"),
        (["--max-rows", 0, "--picture", "p.png"], "--max-rows 0 must be at least 1"),
        (["--picture", f"{__file__}/p.png"], "cannot write --picture"),
    ],
)
def test_options_of_inspect_that_cannot_be_meant_are_refused_first(tmp_path, words, message):
    with pytest.raises(DataError, match=message):
        run("inspect", tmp_path / "no-split", *words)


def test_the_examples_of_prepare_can_be_copied():
    lines = [line.strip() for line in app_help("data", "prepare").splitlines()]
    examples = [line for line in lines if line.startswith("megatron-eso data prepare")]
    assert len(examples) == 4 and all("--vocab-size" in e or "--tokenizer" in e for e in examples)


def app_help(*words):
    """Return the help text as a person sees it, which the overall command prepares."""
    return CliRunner().invoke(main_app, [*words, "--help"]).output


def test_a_given_tokenizer_decides_the_vocabulary(prepared, corpus, tmp_path):
    output = run("prepare", corpus, "--out", tmp_path / "set", "--sequence-length", 16,
                 "--tokenizer", prepared / "tokenizer.json", "--processes", 1)  # fmt: skip
    assert "vocabulary 300" in output


def test_inspect_prints_counts_and_text_and_draws(prepared, tmp_path):
    output = run("inspect", prepared / "train", "--row", 1, "--picture", tmp_path / "lengths.png")
    assert "num_documents" in output
    assert "--- row 1 ---" in output
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_an_unknown_format_is_refused_first(tmp_path):
    with pytest.raises(DataError, match=r"--picture .*x\.foo: \.foo is not one of .*png"):
        run("inspect", tmp_path / "no-split", "--picture", tmp_path / "x.foo")


def test_verify_accepts_what_prepare_wrote(prepared):
    assert "rows are whole" in run("verify", prepared / "train", prepared / "validation")


def test_verify_names_every_damaged_shard(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "set")
    shard = tmp_path / "set" / "train" / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="has 1 fault"):
        run("verify", tmp_path / "set" / "train")


def all_rows(folder) -> np.ndarray:
    manifest = load_manifest(folder)
    reader = ValidationReader(
        folder, sequence_length=manifest.sequence_length, vocab_size=manifest.vocab_size
    )
    return reader.read(range(reader.num_rows)).tokens


def test_merge_joins_rows_and_counts(prepared, tmp_path):
    splits = [prepared / "train", prepared / "validation"]
    run("merge", *splits, "--out", tmp_path / "both")
    expected = np.concatenate([all_rows(split) for split in splits])
    assert np.array_equal(all_rows(tmp_path / "both"), expected)
    run("verify", tmp_path / "both")


def test_merge_leaves_a_folder_beside_its_output_alone(prepared, tmp_path):
    (tmp_path / "both.tmp").mkdir()
    (tmp_path / "both.tmp" / "mine").write_text("keep")
    run("merge", prepared / "train", prepared / "validation", "--out", tmp_path / "both")
    assert (tmp_path / "both.tmp" / "mine").read_text() == "keep"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "both.tmp"]


def test_merging_a_split_with_itself_is_refused(prepared, tmp_path):
    with pytest.raises(DataError, match="hold the same shard"):
        run("merge", prepared / "train", prepared / "train", "--out", tmp_path / "both")


def test_merging_splits_that_do_not_fit_names_the_difference(prepared, corpus, tmp_path):
    run("prepare", corpus, "--out", tmp_path / "set", "--sequence-length", 32,
        "--tokenizer", prepared / "tokenizer.json", "--processes", 1)  # fmt: skip
    with pytest.raises(DataError, match=r"sequence_length=32, .* has 16"):
        run("merge", prepared / "train", tmp_path / "set" / "train", "--out", tmp_path / "both")


def test_mix_counts_exactly_what_the_reader_reads(prepared, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data:\n  sources:\n    - {{path: {prepared}/train, weight: 3}}\n"
        f"    - {{path: {prepared}/validation, weight: 1}}\n"
        "train: {global_batch_rows: 8, sequence_length: 16}\nmodel: {vocab_size: 300}\n"
    )
    output = run("mix", config, "train.steps=100").splitlines()
    sources = [DataSourceConfig(f"{prepared}/{split}", weight)
               for split, weight in (("train", 3), ("validation", 1))]  # fmt: skip
    reader = RowReader(
        DataConfig(sources=sources), sequence_length=16, vocab_size=300, global_batch_rows=8, seed=1
    )
    pairs = [pair for step in range(100) for pair in reader.samples_of(step, range(8))]
    for number in (0, 1):
        count = sum(source == number for source, _ in pairs)
        assert f" {count:,} rows" in output[1 + number]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.sequence_length=32"], r"data\.sources\[0\]\.path: .* rows of 16 .*_length=32"),
        (["model.vocab_size=400"], "vocabulary of 300 .* model.vocab_size=400"),
        (["data.sources=[]"], "data.sources is empty"),
        (["train.steps=-1"], "train.steps=-1 must be at least 1"),
        (["train.global_batch_rows=0"], "train.global_batch_rows=0 must be at least 1"),
        (
            ["train.tokens=1024"],
            "train.steps=5 and train.tokens=1024 are both set; set one to null",
        ),
        (
            ["train.steps=null", "train.tokens=1000"],
            "train.tokens=1000 is not a multiple of one global",
        ),
        (["train.steps=null"], "set train.steps or train.tokens; both are null"),
    ],
)
def test_mix_refuses_what_the_run_would(prepared, tmp_path, words, message):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {{sources: [{{path: {prepared}/train}}]}}\n"
        "train: {sequence_length: 16, steps: 5}\nmodel: {vocab_size: 300}\n"
    )
    run("mix", config)
    with pytest.raises(UserError, match=message):
        run("mix", config, *words)


def test_what_cannot_be_seen_from_here_is_said_and_the_rest_compared(prepared, tmp_path):
    data = DataConfig(
        sources=[DataSourceConfig(path) for path in (f"{prepared}/train", "/nowhere/train")],
        validation={"far": "s3://bucket/v", "near": f"{prepared}/validation"},
    )
    config = RunConfig(data=data, train=TrainConfig(sequence_length=16),
                       model=ModelConfig(vocab_size=300))  # fmt: skip
    assert unseen_data([config, config]) == [
        "data.sources[1].path=/nowhere/train (not on this machine)",
        "data.validation.far=s3://bucket/v (in an object store)",
    ]
    other = replace(config, train=TrainConfig(sequence_length=32))
    with pytest.raises(DataError, match=r"data\.sources\[0\]\.path: .*train\.sequence_length=32"):
        unseen_data([config, other])
    other = replace(config, data=replace(data, sources=data.sources[1:]),
                    model=ModelConfig(vocab_size=400))  # fmt: skip
    with pytest.raises(DataError, match=r"data\.validation\.near: .*model\.vocab_size=400"):
        unseen_data([other])
    with pytest.raises(DataError, match="name one split"):
        unseen_data([replace(config, data=DataConfig([DataSourceConfig(str(prepared))]))])


@pytest.mark.parametrize(
    ("path", "message"),
    [("", "the path is empty"), (__file__, r"test_commands\.py is a file; name the folder")],
    ids=["empty", "a-file"],
)
@pytest.mark.parametrize("look", [unseen_data, require_data])
def test_what_is_no_split_anywhere_is_refused_before_it_is_looked_for_elsewhere(
    look, path, message
):
    """Said of the settings: it is no data set that the job alone could see."""
    data = DataConfig(sources=[DataSourceConfig(path)])
    with pytest.raises(DataError, match=rf"data\.sources\[0\]\.path: .*{message}"):
        look([RunConfig(data=data)])


def test_the_tokenizers_of_sets_that_are_seen_are_compared(prepared, corpus, tmp_path):
    run("prepare", corpus, "--out", tmp_path / "set", "--sequence-length", 16, "--vocab-size", 300,
        "--processes", 1, "--tokenizer-mib", 1, "--validation-fraction", 0.5)  # fmt: skip
    here, there = DataSourceConfig(f"{prepared}/train"), DataSourceConfig(f"{tmp_path}/set/train")
    config = RunConfig(train=TrainConfig(sequence_length=16), model=ModelConfig(vocab_size=300))
    for data in (DataConfig([here, there]), DataConfig([here], {"other": there.path})):
        for look in (unseen_data, require_data):
            with pytest.raises(DataError, match="another tokenizer"):
                look([replace(config, data=data)])


def write_indexed(prefix, documents: list[np.ndarray], bounds: list[int] | None = None) -> None:
    """Write a Megatron data set by its own description of the layout, with a document a sequence."""
    lengths = np.array([len(document) for document in documents], np.int32)
    offsets = (np.cumsum(lengths) - lengths).astype(np.int64) * 2
    if bounds is None:
        bounds = list(range(len(documents) + 1))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(documents), len(bounds))
    index = header + lengths.tobytes() + offsets.tobytes() + np.array(bounds, np.int64).tobytes()
    prefix.with_suffix(".idx").write_bytes(index)
    prefix.with_suffix(".bin").write_bytes(np.concatenate(documents).astype("<u2").tobytes())


def test_converting_megatrons_files_keeps_every_document(prepared, tmp_path):
    tokenizer = Tokenizer(prepared / "tokenizer.json")
    texts = ["first text", "second one, longer than the first " * 3, "third"]
    end = tokenizer.end_of_document_id
    write_indexed(tmp_path / "old", [np.array([*tokenizer.encode(text), end]) for text in texts])
    run("convert", tmp_path / "old", "--out", tmp_path / "new", "--sequence-length", 16,
        "--tokenizer", prepared / "tokenizer.json")  # fmt: skip
    run("verify", tmp_path / "new")
    manifest = load_manifest(tmp_path / "new")
    assert manifest.num_documents == 3
    assert manifest.text_bytes == sum(len(text) for text in texts)
    reader = ValidationReader(tmp_path / "new", sequence_length=16, vocab_size=300)
    rows = reader.read(range(reader.num_rows))
    stream = rows.tokens[:, :-1][rows.is_valid[:, :-1]]
    expected = [token for text in texts for token in [*tokenizer.encode(text), end]]
    assert stream.tolist() == expected


@pytest.mark.parametrize(
    "bounds", [[], [0], [0, 1], [1, 3], [0, 1, 5], [0, 2, 1, 3]],
    ids=["none", "no document", "ends early", "begins late", "ends late", "goes back"],
)  # fmt: skip
def test_bounds_that_leave_out_or_repeat_sequences_are_refused(tmp_path, bounds):
    write_indexed(tmp_path / "old", [np.array([1, 2, 3])] * 3, bounds)
    with pytest.raises(DataError, match=r"old\.idx is damaged: .* must grow from 0 to its 3"):
        open_indexed(tmp_path / "old")


def test_megatrons_files_without_tokens_or_with_too_few_are_refused(tmp_path):
    write_indexed(tmp_path / "old", [np.array([], np.int64)])
    with pytest.raises(DataError, match=r"old\.bin has 0 bytes.*nothing to convert"):
        open_indexed(tmp_path / "old")
    write_indexed(tmp_path / "old", [np.array([1, 2, 3])])
    (tmp_path / "old.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"old\.bin has 0 bytes, its index 3 tokens .* is damaged"):
        open_indexed(tmp_path / "old")
    write_indexed(tmp_path / "old", [np.array([1, 2, 3])])
    (tmp_path / "old.bin").write_bytes(b"12345")
    with pytest.raises(DataError, match=r"old\.bin has 5 bytes, its index 3 tokens of 2"):
        open_indexed(tmp_path / "old")


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_megatrons_own_builder_writes_what_convert_reads(prepared, tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    tokenizer = Tokenizer(prepared / "tokenizer.json")
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "old.bin"), dtype=np.uint16)
    for text in ("one document", "and another"):
        builder.add_document(torch.tensor(tokenizer.encode(text)), [len(tokenizer.encode(text))])
    builder.finalize(str(tmp_path / "old.idx"))
    documents = list(open_indexed(tmp_path / "old").documents())
    assert [tokenizer.decode(one.tolist()) for one in documents] == ["one document", "and another"]


def test_converting_with_too_small_a_tokenizer_names_the_document(prepared, tmp_path):
    write_indexed(tmp_path / "old", [np.array([5, 6]), np.array([5, 299])])
    with pytest.raises(DataError, match=r"document 1 holds tokens 5 to 299, but .* has 0 to 298"):
        run("convert", tmp_path / "old", "--out", tmp_path / "new",
            "--tokenizer", prepared / "tokenizer.json")  # fmt: skip


@pytest.mark.parametrize("command", ["prepare", "inspect", "verify", "merge", "mix", "convert"])
def test_every_command_has_help_with_an_example(command):
    assert "megatron-eso data" in run(command, "--help")
