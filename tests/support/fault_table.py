"""Every fault that the suite tries, one row each; `docs/reference/faults.md` is written from it by `make faults`.

A row says what is done to an artifact or a machine, what must come of it, and which test shows it: a file in `tests/` and a
test in it, with its parameter where one of several is meant. `test_fault_table.py` holds the page to the rows, the rows to the
tests that there are, and the tests of this folder to the rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

HOSTILE = "runtime/check/test_hostile_artifacts.py::test_it_is_refused_in_words_before_anything_is_opened"
CONTRACT = "runtime/test_contract.py::test_a_wrong_input_is_named_with_what_came_and_the_nearest_that_is_right"
CONSTANTS = "runtime/test_artifact.py::test_constants_must_be_exactly_the_compiled_ones"
CANARIES, RESULTS = "exporter/verify/test_canaries.py::", "exporter/verify/test_results.py::"
PLACEMENT = "exporter/verify/test_placement.py::"
DAMAGED, DISKS, PROMPTS = "faults/test_damaged.py::", "faults/test_disks.py::", "faults/test_prompts.py::"
KILLED, EXPORTS, AROUND = "faults/test_killed.py::", "faults/test_exports.py::", "faults/test_surroundings.py::"
COMPILER, SHELL = "faults/test_compiler.py::", "runtime/cli/test_command.py::"
AOTI = "exporter/lower/aoti/test_aoti.py::"
FIRST = "runtime/check/test_first_call.py::"
ARGUMENTS = "runtime/call/test_arguments.py::"
ATTRIBUTES = "runtime/call/test_attributes.py::"
ATTACHED = "runtime/attachment/test_attach_refusals.py::"
REGISTRY = "exporter/families/test_registry.py::"
SOURCE = "exporter/load/test_source.py::"
MEMORY, FUZZ, TRUST = "faults/test_memory.py::", "runtime/check/test_fuzz.py::", "runtime/check/test_trust.py::"

FORKS, SELF_TEST = "runtime/process/test_fork.py::", "runtime/process/test_self_test.py::"
CLOSE = "runtime/process/test_close.py::"
WEIGHTS = "runtime/storage/test_weight_files.py::"
SHARDS, COMPONENTS = "runtime/storage/test_shards.py::", "exporter/rewrite/test_quantize_components.py::"
FINITE = "runtime/test_finite.py::"
KERNELS = "exporter/lower/aoti/kernels/"
OPERATORS = KERNELS + "test_operators.py::"
RANGES = "exporter/families/test_ranges.py::"
RATES = "exporter/cost/test_machine_rates.py::"
ENGINE, SERVER = "runtime/engine/test_engine.py::", "runtime/serve/test_serve.py::"


@dataclass(frozen=True)
class Fault:
    """`id` is unique. `test` is a node id below `tests/`; without a parameter it stands for all of that test."""

    id: str
    done: str
    must: str
    test: str


FAULTS: Mapping[str, tuple[Fault, ...]] = {
    "Killed": (
        Fault(
            "killed-export",
            "`kill -9` at every line of progress of an export, and at the end of each of its stages",
            "an earlier artifact is as it was, and nothing has the name of a new one; the next export clears up",
            EXPORTS + "test_killed_at_every_moment",
        ),
        Fault(
            "killed-writing",
            "`kill -9` before every single thing that writing an artifact does to the disk, its last rename among them",
            "under its name lies the earlier artifact, the new one, or nothing; the next export clears up",
            KILLED + "test_while_an_artifact_is_written",
        ),
        Fault(
            "killed-naively",
            "the same, to an export that writes in place",
            "a part is left, which shows that the row above could fail",
            KILLED + "test_an_export_that_writes_in_place_would_be_seen",
        ),
        Fault(
            "killed-unpacking",
            "`kill -9` before every single thing that unpacking machine code does to the cache, and in the middle of a file",
            "no entry is half; the next load unpacks it right and clears up",
            KILLED + "test_while_code_is_unpacked",
        ),
        Fault(
            "killed-cache",
            "a cache entry that is half, tampered with, crowded, linked, or open to others",
            "it is replaced, and never opened",
            "runtime/test_artifact.py::test_a_damaged_cache_entry_is_replaced",
        ),
        Fault(
            "killed-compiling",
            "`kill -9` to an export whose compiler runs, and at once another export, in the same folder",
            "the same code as ever, although the compiler that was left behind still writes",
            COMPILER + "test_killed_while_the_compiler_runs",
        ),
        Fault(
            "interrupted-export",
            "Ctrl-C in an export",
            "nothing is left",
            "end_to_end/test_export.py::test_ctrl_c_leaves_nothing",
        ),
    ),
    "Disks": (
        Fault(
            "full-export",
            "an export to a disk (a tmpfs of that size) that has ever more room",
            "`OUTPUT: cannot be written, since DISK says 'No space left on device'; make room, ...`, and nothing is left",
            EXPORTS + "test_a_disk_that_is_full",
        ),
        Fault(
            "full-cache",
            "the cache is full, or read-only",
            "code is unpacked into a temporary folder, and the load works",
            DISKS + "test_it_is_loaded_all_the_same",
        ),
        Fault(
            "full-everything",
            "the cache cannot be written, and temporary files cannot either",
            "`CACHE: machine code cannot be unpacked there (No space left on device), nor into a temporary folder (...); give load() ...`",
            DISKS + "test_it_is_refused_in_words",
        ),
        Fault(
            "noexec",
            "the cache, or TMPDIR, lies on a disk without execution",
            "`...wrapper.so: ... failed to map segment ...; its disk allows no execution, so give load() a cache_dir on one that does`",
            DISKS + "test_where_code_may_not_run_it_says_what_to_give",
        ),
        Fault(
            "full-tmpdir",
            "TMPDIR's disk is full, where a compiler or a library says so in its own words",
            "`OUTPUT: cannot be written, since TMPDIR/ccX.s says 'No space left on device'; make room, or choose another TMPDIR`",
            "exporter/package/test_disk.py::test_a_compiler_that_names_a_file_in_tmpdir",
        ),
        Fault(
            "read-only-artifact",
            "the artifact lies on a read-only file system",
            "it is loaded; nothing is written there",
            DISKS + "test_it_is_loaded_all_the_same[the artifact is read-only]",
        ),
        Fault(
            "read-only-output",
            "the folder of an export's output cannot be written",
            "`FOLDER: cannot be written by this user; choose another --output`, before anything is loaded",
            DISKS + "test_an_output_that_cannot_be_written_is_refused_at_once",
        ),
        Fault(
            "forbidden",
            "the artifact's folder, its manifest, a folder in it or a weight file, which this user may not read",
            "`ARTIFACT: manifest.json: this user may not read it (Permission denied); its owner can change that: ...`",
            AROUND + "test_files_that_this_user_may_not_read",
        ),
        Fault(
            "failing-disk",
            "a disk that fails while a file of it is hashed",
            "`weights/...: cannot be read (Input/output error); if its disk is failing, restore the file on another one`",
            AROUND + "test_a_disk_that_fails",
        ),
        Fault(
            "no-tmpdir",
            "TMPDIR names no folder",
            "the load works, by the cache or by the system's folder for temporary files",
            DISKS + "test_it_is_loaded_all_the_same[TMPDIR is missing]",
        ),
        Fault(
            "shared-cache",
            "other users can write to the cache",
            "it is not used",
            "runtime/test_artifact.py::test_a_cache_that_others_can_write_is_not_used",
        ),
    ),
    "Machines": (
        Fault(
            "no-compiler-export",
            "PATH has no compiler, at an export",
            "`graph 'toy': AOTInductor could not compile it (... No working C++ compiler found ...)`",
            COMPILER + "test_an_export_without_a_compiler_says_so",
        ),
        Fault(
            "odd-tmpdir",
            "TMPDIR has a space, a quote or a backslash in its path, at an export",
            "`TMPDIR ...: Inductor cannot compile in a folder with a space, ...; set TMPDIR to another folder`, before a model is loaded",
            AOTI + "test_a_tmpdir_in_which_no_compiler_can_work_is_refused_at_once",
        ),
        Fault(
            "compiler-error",
            "a compiler that fails, with its error among hundreds of lines",
            "the line with its error is in the message",
            AOTI + "test_the_compilers_own_error_is_in_the_message",
        ),
        Fault(
            "growing-tmpdir",
            "exports with other flags, one after the other",
            "headers that Inductor compiles are kept in one private folder, the newest four and today's",
            AOTI + "test_compiled_headers_are_kept_in_bounds",
        ),
        Fault(
            "no-compiler-load",
            "PATH has no compiler, at a load",
            "it is not missed: a load starts no process",
            "runtime/test_artifact.py::test_loading_starts_no_process_and_needs_no_compiler",
        ),
        Fault(
            "other-isa",
            "the CPU lacks instructions that the code was compiled for",
            "`was compiled for ..., this CPU lacks avx2048; export again on this machine, or with a lower compile.isa`",
            f"{HOSTILE}[missing instructions]",
        ),
        Fault("other-torch", "another torch", "`was compiled with torch 1.0, this is torch 2...`", f"{HOSTILE}[other torch]"),
        Fault(
            "older-format",
            "an artifact of an older format",
            "`this runtime reads version 2, the file says 1`",
            f"{HOSTILE}[older version]",
        ),
        Fault(
            "other-size",
            "a call for a size that the artifact has not",
            "the nearest two sizes",
            "exporter/families/test_sizes_and_batches.py::test_sizes_that_are_not_there_are_refused_with_the_nearest_two",
        ),
        Fault(
            "outside-range",
            "a call for a size that is not in the artifact's range",
            "the nearest two legal sizes",
            RANGES + "test_sizes_outside_are_refused_with_the_nearest_two",
        ),
        Fault(
            "tensors-outside-range",
            "a graph of a range is called with tensors of no size in it",
            "which dimension has what, and what it is of height and width",
            RANGES + "test_a_graph_refuses_tensors_of_no_size_in_the_range",
        ),
        Fault(
            "range-of-a-family",
            "a range is asked for of a family whose graphs are for one size",
            "why, and `shapes.sizes` as the way out",
            RANGES + "test_families_of_one_size_refuse_a_range_by_name",
        ),
        Fault(
            "range-of-a-backend",
            "a range is asked for of a backend without dynamic axes",
            "why, and `shapes.sizes` as the way out",
            RANGES + "test_backends_of_one_size_refuse_a_range_by_name",
        ),
        Fault(
            "range-schedules",
            "a plan lacks the schedule of an area, or has one that no loop could run",
            "which area, and what of it",
            RANGES + "test_schedules_that_a_reader_could_not_run_are_named",
        ),
        Fault(
            "range-shapes",
            "a manifest's shapes follow the size in an artifact without a range",
            "`follows the size, and the artifact has no range`",
            f"{HOSTILE}[a shape without a range]",
        ),
        Fault("other-glibc", "an older C library", "`needs glibc 99.1, this system has ...`", f"{HOSTILE}[newer glibc]"),
        Fault(
            "other-symbols",
            "a library needs symbol versions that are not here",
            "`a.so: needs GLIBC_99.10 of libc.so.6, the one here has ... at most; ...`",
            "runtime/check/test_machine.py::test_a_newer_version_of_a_symbol_is_refused_with_the_newest_here",
        ),
        Fault(
            "executable-stack",
            "a library asks for an executable stack, and glibc is 2.41 or later",
            "`a.so: asks for an executable stack, which glibc 2.41 refuses; export again`",
            "runtime/check/test_machine.py::test_an_executable_stack_is_refused_where_glibc_refuses_it",
        ),
        Fault(
            "memory",
            "a load with ever more address space left (`RLIMIT_AS`)",
            "`ARTIFACT: memory ran out while it was opened; raise the limit of this process ...`, at every step of it",
            MEMORY + "test_a_load_without_enough_memory_says_so",
        ),
        Fault(
            "memory-steps",
            "the same",
            "it ran out at weights, and elsewhere too, or the row above would show little",
            MEMORY + "test_memory_ran_out_at_more_than_one_step",
        ),
        Fault(
            "memory-leaks",
            "the same",
            "no descriptor, thread, mapping or temporary file is left",
            MEMORY + "test_what_was_refused_leaves_nothing_behind",
        ),
        Fault(
            "memory-after",
            "the same, and then without the limit",
            "it is loaded, and computes what it computed before",
            MEMORY + "test_the_process_can_load_it_after_that",
        ),
        Fault(
            "ascii-locale",
            "a locale of ASCII alone, a prompt and names with more than that",
            "the same picture as in UTF-8",
            AROUND + "test_a_prompt_is_the_same_in_every_locale",
        ),
        Fault(
            "poor-terminal",
            "a terminal that cannot show a name",
            "the name is escaped, and nothing else happens",
            AROUND + "test_what_a_terminal_cannot_show_is_no_error",
        ),
        Fault(
            "ascii-manifest",
            "a manifest with more than ASCII, in such a locale",
            "it is read as UTF-8",
            AROUND + "test_a_manifest_is_utf_8_in_every_locale",
        ),
        Fault(
            "locale-export",
            "an export in another locale and time zone",
            "the same bytes",
            EXPORTS + "test_another_locale_time_zone_and_day",
        ),
        Fault(
            "clock",
            "a clock that is set back or forward by years",
            "files are hashed once more, or not; never is another file taken for one that was found right",
            AROUND + "test_a_clock_that_was_set_back_costs_a_hash_and_no_more",
        ),
        Fault("old-files", "files of 1970, and of 2100", "they are loaded", AROUND + "test_files_of_any_age_are_loaded"),
        Fault("no-bfloat16", "a recipe in bfloat16, exported on a CPU without instructions for it", "float32 in its place, and the export says so and how to keep bfloat16", KERNELS + "test_kernel_rewrite.py::test_bfloat16_is_float32_where_no_instruction_multiplies_it"),
        Fault("int8-saturation", "int8 layers on a CPU without VNNI, of weights and rows whose sums no 16 bits hold", "the sums of the integers, to the bit", OPERATORS + "test_the_largest_sums_of_bytes_are_exact"),
    ),
    "Several at once": (
        Fault(
            "two-exports",
            "two exports to one output, without `--force` and with it",
            "one is put in place; without `--force` the other says `already exists since this export began`",
            EXPORTS + "test_two_exports_to_one_output",
        ),
        Fault(
            "many-exports",
            "six that end in the same moment, again and again",
            "one is put in place, whole; each other is told",
            KILLED + "test_of_exports_to_one_output_one_wins_and_the_others_are_told",
        ),
        Fault(
            "many-forced",
            "six with `--force`",
            "each ends well, and one is left, whole",
            KILLED + "test_of_exports_by_force_each_ends_well_and_one_is_left",
        ),
        Fault(
            "many-unpacking",
            "eight processes that unpack the same code, into an empty cache and over a damaged entry",
            "each opens the right bytes, and one entry is left",
            KILLED + "test_of_processes_that_unpack_the_same_code_each_gets_it",
        ),
        Fault(
            "threads-unpacking",
            "eight threads that do so",
            "the same",
            "runtime/test_artifact.py::test_many_may_unpack_at_once",
        ),
        Fault(
            "replaced-weights",
            "weights that are replaced between the check and the load",
            "what was compared is what is mapped",
            TRUST + "test_weights_that_are_replaced_after_the_check_are_not_the_ones_that_are_mapped",
        ),
        Fault(
            "replaced-onnx",
            "the same, with ONNX Runtime, whose optimizer reads weights before any kernel does",
            "what was compared is what it reads",
            "exporter/lower/test_onnxruntime.py::test_weights_that_are_replaced_after_the_check_are_not_read",
        ),
        Fault(
            "replaced-code",
            "code, or a plan, that is replaced between the check and the load",
            "`graphs/denoiser.pt2: sha256 is ..., the manifest says ...`",
            TRUST + "test_what_is_read_is_hashed_from_what_was_read",
        ),
        Fault(
            "linked-code",
            "a link in its place, at that moment",
            "`... cannot be opened as a plain file (Too many levels of symbolic links); ...`",
            TRUST + "test_a_link_in_its_place_is_not_followed",
        ),
    ),
    "Damaged files": (
        Fault(
            "rates-broken",
            "the file of this machine's rates: cut, empty, of another format or machine, with numbers that are none",
            "a forecast measures the rates again and writes the file anew; `prebake inspect --machine` leaves the broken one out",
            RATES + "test_a_file_that_is_broken_or_foreign_is_measured_again",
        ),
        Fault(
            "flipped",
            "one bit of any file: of a header, code, a number, a weight, JSON, a zip's directory",
            "`PATH: sha256 is ..., the manifest says ...; restore the file or export again ...`",
            DAMAGED + "test_a_flipped_bit_is_told_by_its_hash",
        ),
        Fault(
            "cut",
            "any file, cut at such a place",
            "`PATH has N bytes, the manifest says M; restore the file or export again`",
            DAMAGED + "test_a_file_that_is_cut_is_told_by_its_size",
        ),
        Fault(
            "flipped-listed",
            "one bit, and a manifest that fits",
            "what says something of itself is refused, by what is wrong with it",
            DAMAGED + "test_a_flipped_bit_that_is_listed",
        ),
        Fault(
            "cut-listed",
            "a file that is cut, and a manifest that fits",
            "`PATH: expected a .pt2 package, but File is not a zip file; ...`, or safetensors, or a plan",
            DAMAGED + "test_a_file_that_is_cut_and_listed",
        ),
        Fault("whole", "nothing", "it is loaded, or the rows above show nothing", DAMAGED + "test_the_whole_one_gets_as_far_as_its_code"),
        Fault("cut-manifest", "a manifest that is cut", "`manifest.json: expected JSON, but ...`", DAMAGED + "test_a_manifest_that_is_cut"),
        Fault("flipped-hash", "one digit of a hash in the manifest", "`PATH: sha256 is ...`", DAMAGED + "test_every_bit_of_a_hash_counts"),
        Fault(
            "flipped-syntax",
            "one bit of a manifest's braces, brackets, colons, commas and quotes",
            "`manifest.json ...`",
            DAMAGED + "test_every_character_of_a_manifests_syntax_counts",
        ),
        Fault(
            "signed-manifest",
            "any other bit of a manifest, which no hash is of",
            "a signature finds it (`trust=\"signature\"`); without one it is another artifact",
            "exporter/package/test_signature_check.py::test_a_changed_manifest",
        ),
        Fault("negative-size", "a size of -1", "`manifest.json [files.0.size]: Input should be greater than or equal to 0; ...`", DAMAGED + "test_a_size_that_is_none"),
        Fault("lfs", "a clone without Git LFS", "`PATH is a pointer of Git LFS, not the file itself; ...`", f"{HOSTILE}[a pointer of Git LFS]"),
        Fault("deeper", "an artifact that was unpacked one folder deeper", "`expected manifest.json ..., found none; there is one in ...`", f"{HOSTILE}[one folder deeper]"),
        Fault("unlisted", "a `.git` in the folder, or the rest of another artifact", "`.git/ has 30 files that are not in the manifest, such as ...`", f"{HOSTILE}[a repository]"),
        Fault("missing", "a file that is missing", "`plans/2.json is missing, the manifest lists it; ...`", f"{HOSTILE}[missing file]"),
        Fault(
            "nan-weight",
            "a weight of the model that is not a number, at export",
            "`evaluation 0 of 2 of plan '2': the latents are not finite (64 NaN of 1024); ...`",
            EXPORTS + "test_a_weight_that_is_not_a_number",
        ),
        Fault(
            "nan-later",
            "a weight that becomes one in the artifact",
            "`weights/...: sha256 is ...`",
            DAMAGED + "test_not_a_number_among_the_weights_is_found_by_its_hash",
        ),
    ),
    "Broken artifacts": (
        Fault("wrong-weight", "the rows, or the sign, of one weight are others in an artifact, or the scale of one int8 layer", "evaluations at equal inputs miss the recipe, in units of what eager bfloat16 loses", CANARIES + "test_one_wrong_weight_or_scale_is_missed"),
        Fault("wrong-number", "one number of a weight, too small a change for any evaluation to show", "the comparison with the model's own weights names the tensor", CANARIES + "test_one_number_that_no_evaluation_shows_is_missed"),
        Fault("wrong-coefficient", "one coefficient of a scheduler or a cache, or one timestep, is off by 1 %", "the comparison with the plan made anew names the plan", CANARIES + "test_one_coefficient_that_is_off_by_one_percent_is_missed"),
        Fault("whole-artifact", "nothing", "the artifact passes", CANARIES + "test_an_artifact_that_is_whole_passes"),
        Fault("verify-interrupted", "`prebake verify --source` is interrupted", "the next one asks eager only for the rest, and reports the same", RESULTS + "test_a_resumed_and_a_merged_comparison_equal_a_whole_one"),
        Fault("verify-damaged-result", "a kept result of eager's is damaged", "it is computed again", RESULTS + "test_a_damaged_file_is_as_none"),
        Fault("verify-lone-part", "`--part` without `--results`", "refused, since nobody could put the parts together", RESULTS + "test_a_part_needs_a_folder"),
        Fault("verify-no-gpu", "a GPU's artifact, or a recipe whose reference runs on a GPU, where torch sees none", "refused: it is not held to what a CPU rounds", PLACEMENT + "test_a_gpu_that_is_not_there_is_refused_with_the_way_out"),
        Fault("verify-no-bfloat16", "a pipeline that torch cannot run in bfloat16", "evaluations are held to the spacing of its numbers, and the report says so", "exporter/verify/test_loss.py::test_a_pipeline_that_does_not_run_in_bfloat16_is_held_to_the_spacing_of_its_numbers"),
        Fault("old-thresholds", "a recipe with `verify.psnr_db` or `verify.relative_error`", "refused, with the keys that took their place", "exporter/recipe/test_problems.py::test_override_is_refused_by_its_own_text"),
    ),
    "Weights in shards": (
        Fault(
            "shard-missing",
            "one of a component's weight shards that is deleted",
            "`weights/...-00001-of-0000N.safetensors is missing, the manifest lists it`",
            SHARDS + "test_a_shard_that_is_not_its_own_is_refused[remove]",
        ),
        Fault(
            "shard-exchanged",
            "two shards of one size, each under the other's name",
            "`weights/...: sha256 is ...`",
            SHARDS + "test_a_shard_that_is_not_its_own_is_refused[exchange]",
        ),
        Fault(
            "shard-added",
            "a shard of another set, beside the artifact's own",
            "`weights/... is not in the manifest; remove it`",
            SHARDS + "test_a_shard_that_is_not_its_own_is_refused[add_stranger]",
        ),
        Fault(
            "shard-foreign",
            "another artifact's shard of the same name, size and keys",
            "`weights/...: sha256 is ...`",
            SHARDS + "test_a_shard_that_is_not_its_own_is_refused[replace_by_stranger]",
        ),
        Fault(
            "shard-unlisted",
            "a shard that is deleted and taken out of the manifest too, with `trust=\"size\"`",
            "`weight ... is in no weight file`",
            SHARDS + "test_a_set_of_shards_that_lacks_one_is_refused_whatever_its_manifest_says",
        ),
        Fault(
            "shard-doubled",
            "a key that two shards have",
            "`key ... is in another weight file too`",
            SHARDS + "test_a_key_in_two_shards_is_refused",
        ),
        Fault(
            "shard-failing-disk",
            "`load(warm=True)`, and a disk that fails while the weights are read ahead",
            "`weights/...: cannot be read (Input/output error); if its disk is failing, ...`",
            SHARDS + "test_a_weight_file_that_cannot_be_read_ahead_is_named",
        ),
    ),
    "Artifacts of strangers": (
        Fault(
            "manifest-file",
            "a manifest that is a pipe, a link to /dev/zero, 5 GB, 300 or 1,500 deep, or a million values",
            "refused in a sentence, within seconds and with little memory, before any hash",
            FIRST + "test_a_manifest_costs_little_before_it_is_trusted",
        ),
        Fault(
            "unbounded",
            "a number, name or list without a bound in the schema of manifest, plan, settings or calls",
            "there is none",
            FIRST + "test_every_number_of_the_schema_has_a_bound",
        ),
        Fault(
            "contradictions",
            "numbers, names, plans, shapes and tokenizers that do not fit each other, with right hashes",
            "`prebake check` says it and `load` refuses it, each in its own sentence",
            FIRST + "test_check_and_load_say_the_same",
        ),
        Fault(
            "before-the-loop",
            "a value that no graph before the loop computes, a prologue that reads latents, a step's graph of a single timestep",
            "`[graphs.full.inputs]: has 'prologue:0', which no call knows`, and so on, before the first call",
            "runtime/call/test_hoist.py::test_graphs_before_the_loop_that_do_not_fit_are_named",
        ),
        Fault(
            "fuzzed-contradictions",
            "the same at random: 11,400 of them by `make fuzz`",
            "refused by both, or it draws; no raw error, none takes 5 s or 2 GiB",
            FUZZ + "test_a_contradiction",
        ),
        Fault(
            "id-at-a-call",
            "a tokenizer that gives an id beyond the embedding for one word",
            "`tokenizer.json: gives the id 3, the text encoder's embedding has 3 rows; ...`, before the graph sees it",
            FIRST + "test_a_word_that_only_some_texts_have_is_refused_when_it_comes",
        ),
        Fault(
            "id-at-export",
            "a token that was added to a tokenizer and has no row in the text encoder",
            "`tokenizer: the token '<new>' has the id 1000, the embedding of its text encoder has 1000 rows; ...`, before anything is captured",
            "exporter/families/test_text.py::test_a_token_that_was_added_without_a_row_is_refused_before_anything_is_captured",
        ),
        Fault(
            "golden-of-another-plan",
            "golden vectors without evaluations, of evaluation 10**9, without a picture, of other shapes",
            "`golden/2.safetensors: ...; restore the file, or export again`, exit code 5",
            "exporter/verify/test_golden.py::test_vectors_of_another_plan_are_refused",
        ),
        Fault(
            "golden-shapes",
            "golden vectors with other tensors than a replay gives",
            "the name, and what it is",
            "exporter/verify/test_golden.py::test_other_tensors_than_the_replays_are_refused",
        ),
        Fault(
            "terminal",
            "escape sequences and new lines in names and fields, under `check`, `inspect`, `run` and `pull`",
            "they are shown, and move no cursor and begin no line",
            "runtime/cli/test_streams.py::test_names_move_no_cursor_and_begin_no_line",
        ),
        Fault(
            "pull-size",
            "a file of 3 GB, where the manifest says 84 bytes, in a folder that is pulled",
            "refused by its size; nothing of it is copied",
            "runtime/transfer/test_folder.py::test_no_more_is_written_than_was_said",
        ),
        Fault(
            "pull-growing",
            "a file that grows while it is pulled",
            "no more is written than was said",
            "runtime/transfer/test_folder.py::test_a_file_that_grows_while_it_is_copied_is_cut_off",
        ),
        Fault(
            "force-others",
            "`--force` to a folder with an artifact and a file of the user's",
            "`'notes/thesis.tex' in it is no file of one; move it away`, and it stays",
            "exporter/package/test_package.py::test_force_never_replaces_what_is_not_the_artifacts",
        ),
        Fault(
            "umask",
            "an umask of 077 or 027 at export",
            "nobody may read the artifact whom it does not let",
            "exporter/package/test_package.py::test_the_umask_says_who_may_read",
        ),
        Fault(
            "private",
            "an artifact that is private, and is changed or replaced",
            "it stays private",
            "exporter/package/test_package.py::test_what_was_private_stays_so",
        ),
        Fault(
            "plan-after-sign",
            "`prebake plan` or `verify --source` on a signed artifact",
            "it says that the signature is gone, or signs again with `--key`",
            "exporter/package/test_sign.py::test_plan_and_verify_watch_the_signature",
        ),
        Fault(
            "void-signature",
            "a signature of another state of the artifact",
            "`prebake check` and `push` refuse it: `signature.json is of another state of the artifact: ...`",
            "exporter/package/test_signature_check.py::test_check_and_push_say_that_a_signature_does_not_hold",
        ),
        Fault(
            "older-release",
            "an older artifact, as well signed, in the place of the new one",
            "`is release 3, at least 4 was asked for; ...`, with `minimum_release`",
            "exporter/package/test_signature_check.py::test_an_older_release_is_refused_though_it_is_signed",
        ),
    ),
    "Hostile artifacts": (
        Fault("fuzzed-manifest", "a manifest damaged at random", "refused, or every listed file is what it was", FUZZ + "test_a_manifest"),
        Fault("fuzzed-plan", "a plan", "refused, or read as what it says, all numbers finite", FUZZ + "test_a_plan"),
        Fault("fuzzed-weights", "a weight file, its header above all", "refused, or mapped as it says", FUZZ + "test_weights"),
        Fault("fuzzed-package", "a package", "refused, or its code is opened as it is in it", FUZZ + "test_a_package"),
        Fault("fuzzed-members", "a package's members", "the same", FUZZ + "test_members_of_a_package"),
        Fault(
            "fuzzed-unlisted",
            "any of them, without a word in the manifest",
            "refused",
            FUZZ + "test_what_the_manifest_does_not_know_is_never_opened",
        ),
        Fault(
            "zip-slip",
            "a member `.../../../../x`",
            "`member '...' has a name that could leave the package's folder; do not open this package`",
            f"{HOSTILE}[zip slip]",
        ),
        Fault(
            "compile-flags",
            "a member `*compile_flags.json`, which torch's loader makes a shell command of",
            "`member '...' is source code or compile flags, which a loader would compile and run; do not open this package`",
            f"{HOSTILE}[compile flags]",
        ),
        Fault("source-code", "a member `.cpp`", "the same", f"{HOSTILE}[source code]"),
        Fault(
            "no-code",
            "a `.so` that is none",
            "`a.wrapper.so: expected a shared library, but it does not begin like a 64-bit little-endian ELF file`",
            f"{HOSTILE}[not a library]",
        ),
        Fault(
            "short-code",
            "a `.so` that is cut behind its header",
            "`a.wrapper.so: expected a shared library, but its segments lead out of the file; ...`",
            DAMAGED + "test_a_library_that_is_cut_behind_its_header",
        ),
        Fault(
            "archive-version",
            "an archive of another version of torch's format",
            "`archive_version is '1', this runtime reads '0'; ...`",
            DAMAGED + "test_an_archive_of_another_version",
        ),
        Fault(
            "model-missing",
            "a package without a model that the manifest names",
            "`the manifest names the models full, reuse, the package has full; export again`",
            f"{HOSTILE}[model missing]",
        ),
        Fault(
            "no-pipeline",
            "an artifact that opens and is no pipeline: its verification failed, its family is unknown, its settings are incomplete",
            "`prebake check` refuses it, as `load` does",
            "runtime/check/test_machine.py::test_check_refuses_what_opens_and_is_no_pipeline",
        ),
        Fault("all-rules", "one artifact for every other rule of the format", "its own sentence", HOSTILE),
    ),
    "Calls": (
        Fault(
            "unbound",
            "a graph is called before its constants are bound",
            "`graph 'vae_decoder': called before its 2 constants were bound`",
            "runtime/test_artifact.py::test_a_graph_is_not_callable_before_its_constants_are_bound",
        ),
        Fault(
            "constants",
            "constants that are missing, too many, of another dtype or size",
            "`graph 'vae_decoder': constant 'out.bias' is not bound (1 in all); export again`, and the like",
            CONSTANTS,
        ),
        Fault("wrong-shape", "an input of another shape", "the input, what was expected, what came, the nearest that is right", f"{CONTRACT}[shape]"),
        Fault("wrong-batch", "another batch", "the same", f"{CONTRACT}[batch]"),
        Fault("wrong-dtype", "another dtype", "the same", f"{CONTRACT}[dtype]"),
        Fault("wrong-strides", "strides that are not contiguous", "the same", f"{CONTRACT}[strides]"),
        Fault("wrong-scalar", "a number in place of a tensor", "the same", f"{CONTRACT}[scalar]"),
        Fault("number-types", "a seed, a size, a number of steps or a guidance as NumPy's number, or as a tensor of one", "the same bits as with Python's number", ARGUMENTS + "test_a_number_means_itself_whatever_its_type"),
        Fault("no-number", "a seed of 65 bits or in words, a list where one number belongs, a number as generator, a text as latents, ...", "`NAME: expected a whole number, got 'x'`", ARGUMENTS + "test_what_is_none_is_refused_in_a_sentence"),
        Fault("misspelt", "an argument that the call does not have", "`num_infernce_steps: ... does not take it; did you mean num_inference_steps? it takes ...`", ARGUMENTS + "test_a_misspelt_argument_is_answered_with_the_nearest_and_all"),
        Fault("no-effect", "reading or setting what diffusers' pipelines have and this one has not: `scheduler`, `load_lora_weights`, `enable_model_cpu_offload`, ...", "`scheduler: ImagePipeline has no such attribute, for its schedules were tabulated at export; ...`", ATTRIBUTES + "test_what_is_diffusers_alone_is_refused_with_the_way_out"),
        Fault("misspelt-attribute", "`pipe._interupt = True`", "`_interupt: ... did you mean _interrupt?`", ATTRIBUTES + "test_a_misspelt_attribute_is_answered_with_the_nearest"),
        Fault("moved", "`pipe.to(...)` with another device or dtype", "`to('cuda'): the artifact was compiled for cpu, ...`", ATTRIBUTES + "test_to_somewhere_else_is_refused_with_the_way_there"),
        Fault("guidance-in-callback", "`pipe._guidance_scale = ...` in a callback", "the steps that follow have that guidance, as in diffusers, to 1e-5", "exporter/families/test_sd.py::test_a_callback_changes_the_guidance_of_the_steps_that_follow"),
        Fault("guidance-embedded", "the same, with a model that is told its guidance before the first step", "`_guidance_scale: this model is told its guidance before the first step; ...`", ATTRIBUTES + "test_guidance_that_is_embedded_before_the_loop_cannot_be_changed_in_it"),
        Fault("no-plan", "a number of steps that the artifact has no plan for", "`num_inference_steps=14: the artifact has the plans 4, 8; prebake plan ARTIFACT --steps 14 adds one without compiling where its variants are there, or ...`", "runtime/test_pipeline.py::test_a_number_of_steps_without_a_plan_says_how_to_add_it"),
        Fault("never-compared", "a plan that was added, and that nobody compared with the pipeline", "drawn, with one warning; the first line of `inspect` and of `repr` says it", "runtime/test_pipeline.py::test_a_plan_that_was_never_compared_says_so_once"),
        Fault("hub-address", "`load(\"hf://owner/name\")`", "`...; fetch one with prebake pull hf://owner/name name, and open that`", "runtime/hub/test_address.py::test_an_address_of_the_hub_is_answered_with_the_command_that_fetches_it"),
        Fault("folder-of-links", "a folder whose files are links, as in the Hub's cache", "`4 of its files are symbolic links, such as manifest.json, ...; make a folder of its own with ...`", "runtime/hub/test_address.py::test_a_folder_of_links_is_answered_in_one_sentence_with_the_way_out"),
        Fault("prompt-long", "a prompt of 10,000 tokens", "drawn; a short warning says what was cut off", PROMPTS + "test_ten_thousand_tokens_are_cut_and_the_warning_is_short"),
        Fault("prompt-strange", "a prompt that is empty, blank, of emoji, right to left, with a zero byte, or one word of 100,000 letters", "drawn, without a warning", PROMPTS + "test_it_is_drawn"),
        Fault("prompt-none", "a prompt that is no text", "`prompt: expected a text or a list of texts, got 7`", PROMPTS + "test_what_is_no_text_is_refused"),
        Fault("prompt-huge", "a megabyte that is no text", "the same, and short", PROMPTS + "test_a_refusal_is_short_too"),
        Fault("prompt-half", "half of a surrogate pair in a prompt", "`prompt: expected a text, got half a character, ...; decode the text as UTF-8`", PROMPTS + "test_half_a_character_is_refused"),
        Fault("prompt-after", "all of these, one after the other", "the next prompt is drawn as ever", PROMPTS + "test_after_all_of_them_it_draws_what_it_drew"),
    ),
    "Server": (
        Fault(
            "served-field",
            "each field of OpenAI's client that an artifact cannot have, and values that it has not",
            "a 400 whose `param` is the field; the next request is drawn",
            SERVER + "test_a_value_that_cannot_be_had_is_a_400_that_names_its_field",
        ),
        Fault(
            "served-refusals",
            "no key, no such model, a body that is no JSON, a body that is too large, no such route",
            "401, 404, 422, 413, 404, each with an error as OpenAI's clients read it",
            SERVER + "test_the_other_refusals",
        ),
        Fault(
            "served-queue",
            "more work than `--max-queue-seconds`",
            "429, and `Retry-After` is what is queued beyond that",
            SERVER + "test_a_long_queue_is_a_429_that_says_when_it_is_over",
        ),
        Fault(
            "served-gone",
            "a client that goes away while its picture is drawn",
            "its request ends after the entry that runs, and the log says so",
            SERVER + "test_clients_that_go_away_cancel_their_requests",
        ),
        Fault(
            "served-slow",
            "a client that reads its events a byte at a time",
            "others are drawn meanwhile",
            SERVER + "test_a_slow_reader_holds_nobody_up",
        ),
        Fault(
            "served-reload",
            "a new version while requests are drawn, by HTTP and by SIGHUP, and one that is damaged",
            "no request is lost, and each is drawn whole by one version; the damaged one is refused, and the last stays",
            SERVER + "test_a_new_version_is_served_without_a_lost_request",
        ),
        Fault(
            "served-damaged",
            "an artifact that is damaged when the server starts",
            "one sentence that names the file, and exit code 5",
            SERVER + "test_a_damaged_artifact_is_a_sentence_and_exit_code_5",
        ),
        Fault(
            "engine-memory",
            "more requests than memory for them, and one that is larger than all of it",
            "they wait unopened; the large one is drawn alone",
            ENGINE + "test_a_request_that_does_not_fit_waits",
        ),
        Fault(
            "engine-failed",
            "a graph that gives NaN once, with other requests in the engine",
            "one request fails and says why, the others are drawn",
            ENGINE + "test_a_failed_request_is_told_and_others_go_on",
        ),
        Fault(
            "engine-shared",
            "an evaluation that several requests share, and that gives NaN for one of them",
            "that request fails, the others are drawn to the bit",
            ENGINE + "test_a_picture_that_fails_in_a_shared_evaluation_fails_alone",
        ),
    ),
    "Command line": (
        Fault("json-failure", "`--json`, and the command is refused, interrupted, misspelt, or ends in a bug", "stdout is one JSON document with `exit_code`, `kind`, and `problems` of `key` and `sentence`", SHELL + "test_a_failure_is_one_json_document_with_code_kind_key_and_sentence"),
        Fault("json-bug", "`--json`, and a bug", "the same, and its traceback on stderr", SHELL + "test_a_bug_is_json_too_and_keeps_its_traceback"),
        Fault("json-usage", "`--json`, and a command line that is none", "the same, and the usage on stderr", SHELL + "test_a_wrong_command_line_is_json_too"),
        Fault("json-twice", "`--json`, and something fails after the result was printed", "one document all the same", SHELL + "test_what_is_written_after_the_result_and_fails_leaves_one_document"),
        Fault("misspelt-option", "an option that is abbreviated or misspelt, a command or a choice that is misspelt", "refused, with the nearest that there is", SHELL + "test_an_option_is_written_in_full_and_a_wrong_one_has_a_nearest"),
        Fault("misspelt-model", "a model's name that is misspelt", "`model 'shape': ...; did you mean 'shapes'?`", "exporter/load/test_source.py::test_a_misspelt_model_has_a_nearest"),
        Fault("broken-pipe", "a reader of stdout that is gone, as in `prebake inspect ARTIFACT | head -1`", "exit code 141, and nothing on stderr", SHELL + "test_a_reader_that_is_gone_is_no_bug"),
        Fault("full-stdout", "stdout on a disk that is full", "`stdout: cannot be written (No space left on device); choose another place for it`", SHELL + "test_a_full_disk_behind_stdout_is_one_sentence"),
        Fault("closed-streams", "stdin, stdout or stderr closed before the command begins, or stderr full", "the exit code is as ever", SHELL + "test_a_stream_that_is_closed_changes_no_exit_code"),
        Fault("closed-progress", "stderr closed, full or broken while an export tells its progress there", "the export ends well, and its files are whole", SHELL + "test_an_export_goes_on_where_its_progress_cannot_be_written"),
        Fault("worst-picture", "one picture of many that is far from eager's", "it is the first in the report and in verify.png, and `worst` in what an export prints", "exporter/verify/test_report.py::test_the_worst_pictures_are_kept_and_come_first"),
        Fault("export-summary", "an export that succeeds", "it prints PSNR mean and worst, prompt accuracy, speed, size, time and where the report is", "exporter/cli/test_summary.py::test_it_says_what_was_achieved"),
        Fault("verified-before", "`prebake verify` of an artifact that was compared before", "it says so", "exporter/verify/test_report.py::test_a_replay_alone_says_whether_the_artifact_was_compared_before"),
        Fault("nothing-to-fuse", "a recipe that fuses, and a model with nothing to fuse", "it is exported, with a note", "exporter/rewrite/test_rewrite.py::test_a_model_with_nothing_to_fuse_is_named"),
        Fault("foreign-scheduler", "each of diffusers' schedulers, at an export of each family", "what the export takes, diffusers' own pipeline draws with; else it is refused, before anything is compiled", "exporter/families/test_schedulers.py::test_what_is_taken_can_be_drawn"),
        Fault("stdout-image", "`prebake run --output -` with several images, a video, `--json`, or a terminal", "refused before anything is loaded", "runtime/cli/test_main.py::test_what_stdout_cannot_hold_is_refused_before_it_is_made"),
        Fault("package-branch-id", "a DeepCache id of the package, on a UNet with other than three up layers a block", "with `numbering = \"package\"` the same layer as the package's", "exporter/caches/test_deepcache.py::test_the_packages_ids_are_the_packages_whatever_the_layers_of_a_block"),
        Fault("batched-fastercache", "`guidance.branches = \"batched\"` with FasterCache", "refused, with the key that says so", "exporter/caches/test_fastercache.py::test_both_branches_at_once_are_refused_by_the_key_that_says_so"),
        Fault("packed-fastercache", "FasterCache on FLUX with true guidance, whose output is packed tokens", "refused, with the way out", "exporter/caches/test_fastercache.py::test_packed_tokens_are_no_picture"),
        Fault("byte-order-mark", "a recipe, a matrix or a list of prompts that begins with a byte order mark", "it is read", "exporter/recipe/test_resolve.py::test_a_file_that_begins_with_a_byte_order_mark_is_read"),
        Fault("sigterm", "SIGTERM or SIGHUP to a command", "it clears up as for Ctrl-C, and ends with 143 or 129", SHELL + "test_a_signal_ends_a_command_as_ctrl_c_does"),
    ),
    "Process state": (
        Fault("forked-process", "`os.fork` or `multiprocessing` with fork after a call, and a call in the child, with two threads", "the same picture, to the bit; in a child of the child too, and after a load there", FORKS + "test_a_call_gives_the_same_picture"),
        Fault("wrong-arithmetic", "a process in which torch's products, attention or convolutions come out wrong (OpenMP gives fewer threads than promised)", "refused at load, naming what is wrong, the threads and the OMP_ variables", SELF_TEST + "test_a_wrong_kernel_is_named_at_load"),
        Fault("wrong-threads", "the same, only after `torch.set_num_threads`", "the next call says it", SELF_TEST + "test_another_number_of_threads_is_tried_at_the_next_call"),
        Fault("nan-argument", "NaN or infinity in latents, embeddings or guidance", "`latents: expected finite numbers, got 1 NaN of 32`, and the like", FINITE + "test_an_argument_that_is_not_finite_is_named"),
        Fault("nan-callback", "a callback whose latents are not finite, returned or in place", "its latents are named", FINITE + "test_a_callbacks_latents_are_looked_at"),
        Fault("nan-evaluation", "a denoiser that gives NaN at one evaluation", "an error that names the evaluation and the plan, in place of a black picture", FINITE + "test_the_evaluation_is_named"),
        Fault("nan-decoder", "a decoder that gives NaN", "an error that names it", FINITE + "test_the_decoder_is_named"),
        Fault("nan-int8", "NaN among the features of a row that an int8 kernel multiplies", "NaN in that row, the others as they were; not a number that looks like any", OPERATORS + "test_what_is_no_number_stays_none_in_its_row"),
        Fault("huge-plan", "a plan with numbers beyond float32", "refused by the schema", FINITE + "test_a_plans_numbers_are_numbers_of_float32"),
        Fault("default-device", "another default device, dtype, autocast, inference mode or deterministic mode of torch around load, call or both", "the same picture, to the bit", "runtime/process/test_torch_state.py::test_the_callers_state_changes_no_picture"),
        Fault("closed-artifact", "`pipe.close()` after calls", "no file of the artifact is mapped, no descriptor is open", CLOSE + "test_nothing_is_mapped_or_open_after_it"),
        Fault("call-after-close", "a call or a graph after `close`", "`it was closed; load it again`", CLOSE + "test_a_call_after_it_is_refused_and_closing_again_is_not"),
        Fault("close-at-work", "`close` while one call is at work and another waits", "the first ends as ever, the other is refused", CLOSE + "test_a_call_at_work_ends_as_ever_and_those_that_wait_are_refused"),
        Fault("replaced-artifact", "an artifact replaced on the disk and loaded anew in the same process", "the same pictures, and no deleted file is mapped", CLOSE + "test_a_server_reloads_a_replaced_artifact"),
        Fault("many-loads", "60 times load, call and close", "maps and descriptors as after 20", CLOSE + "test_many_loads_leave_what_a_few_leave"),
        Fault("weights-written", "a weight file is written to in place after load (`cp -r new/* live/`)", "the next call names the file, and the way out; a file that holds what it held passes", WEIGHTS + "test_a_file_that_is_written_to_after_load_is_named"),
        Fault("weights-written-early", "the same between hash and map", "refused, naming the file", WEIGHTS + "test_a_file_that_is_written_to_between_hash_and_map_is_named"),
        Fault("weights-copied", "the same, and the file cut to nothing, after `load(..., copy=True)`", "the same picture", WEIGHTS + "test_a_copy_is_drawn_with_whatever_is_written"),
        Fault("forked-at-work", "a fork while another thread is in a call, or by a callback; a graph called by the thread that came through", "one sentence that names the fork and the way out, at once", FORKS + "test_what_cannot_go_on_says_so"),
    ),
    "Models": (
        Fault(
            "forecast-many-shapes",
            "a forecast of a model of real size, whose products, convolutions and attentions have a hundred shapes",
            "rates are measured once for the machine, on a grid; a graph of other shapes needs no measurement",
            RATES + "test_a_graph_of_other_shapes_needs_no_measurement",
        ),
        Fault(
            "forecast-slow-kernel",
            "a dtype that the CPU has no instructions for, so that a kernel is a hundred times slower than others",
            "points of the grid that would take long are not timed; their rate is that of the nearest one that was",
            RATES + "test_a_kernel_that_is_slow_is_not_timed_on_what_takes_long",
        ),
        Fault(
            "quantize-nothing",
            "`quantize.text_encoders` or `quantize.vae`, and an exclude list that keeps every layer",
            "`quantize.text_encoders 'int8_weight_only' fits none of the N layers (...)`",
            COMPONENTS + "test_layers_are_kept_by_name_and_what_fits_nothing_is_refused",
        ),
        Fault(
            "quantize-nowhere",
            "`quantize.text_encoders` or `quantize.vae` with TensorRT, for a denoiser alone, or with `lossless = true`",
            "a RecipeError that names the key, before anything is compiled",
            COMPONENTS + "test_who_cannot_refuses_it_by_name_before_anything_is_compiled",
        ),
        Fault(
            "quantize-unasked",
            "int8 weights in ONNX Runtime, whose optimizer would quantize activations too",
            "float32 products, by the graph's form: a test counts the session's nodes",
            "exporter/lower/test_int8_weights.py::test_an_onnx_session_multiplies_the_same_and_holds_the_weights_in_int8",
        ),
        Fault(
            "weights-missing",
            "a component's file that lacks two weights, of every component in turn",
            "`model 'NAME': unet lacks conv_out.bias, ...; download or save the whole model again`, before anything is captured",
            SOURCE + "test_a_component_that_lacks_weights_is_named_with_them",
        ),
        Fault(
            "weights-missing-variant",
            "the same, of a variant (`*.fp16.safetensors`) and of a `.bin` file",
            "the same, of all components that lack some",
            SOURCE + "test_of_a_variant_and_of_torch_files_weights_are_missed_too",
        ),
        Fault(
            "weights-missing-single",
            "the same, of a single file in the original layout",
            "the same, by diffusers' names",
            SOURCE + "test_a_single_file_that_lacks_weights_names_the_component_and_them",
        ),
        Fault(
            "weights-meta",
            "a loaded pipeline with weights that hold no numbers (torch's `meta` device)",
            "the same",
            "api/test_pipeline_copy.py::test_weights_without_numbers_are_refused_by_name",
        ),
        Fault(
            "picture-pipeline",
            "a folder of a pipeline for image to image or inpainting: `StableDiffusionInpaintPipeline`, `FluxImg2ImgPipeline`, ...",
            "exported as its family's; a warning names `sampler.image_to_image` where calls could not begin from a picture",
            REGISTRY + "test_a_folder_of_such_a_pipeline_is_exported_as_its_family_is",
        ),
        Fault(
            "picture-needed",
            "one that no family takes, and that cannot be called with a prompt alone",
            "`StableDiffusionImg2ImgPipeline: could not be called with prompt, ...; it draws with image, which no recipe can give: ...`",
            REGISTRY + "test_a_pipeline_that_cannot_be_called_with_a_prompt_alone_is_refused_in_a_sentence",
        ),
        Fault(
            "tiny-vae",
            "`AutoencoderTiny` in a pipeline whose calls begin from a picture",
            "drawn as diffusers draws it, to 1e-5, also with a mask and with a generator each",
            "exporter/families/test_sd.py::test_pictures_of_a_tiny_vae",
        ),
        Fault(
            "attached-changed",
            "`attach`, and then a LoRA that is loaded or fused, a weight written to (also through `.data`), another processor, a hook, FreeU, ...",
            "the next call is refused: `transformer: its weight 'proj_out.weight' was changed since the artifact was attached, ...; undo it, or detach(pipeline) ...`",
            ATTACHED + "test_a_denoiser_that_was_changed_since_is_refused_by_name",
        ),
        Fault(
            "attached-replaced",
            "`attach`, and then another denoiser in the pipeline",
            "`the pipeline has another transformer since the artifact was attached, ...`, and `detach` gives its scheduler back",
            ATTACHED + "test_another_denoiser_in_the_pipeline_is_refused_and_can_be_detached",
        ),
        Fault(
            "attached-offloaded",
            "`attach`, and then accelerate's hooks on the denoiser",
            "the next call is refused, and so is `detach`, until they are removed",
            ATTACHED + "test_offloading_that_was_set_up_since_is_refused_and_can_be_undone",
        ),
    ),
}  # fmt: skip
EVERY = tuple(fault for faults in FAULTS.values() for fault in faults)
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def covers(fault: Fault, nodeid: str) -> bool:
    """Whether the row's test is that one, or one of its parameters. Node ids begin with `tests/`, or below it."""
    node = nodeid.removeprefix("tests/")
    return node == fault.test or node.startswith(f"{fault.test}[")


def with_table(page: str, outcomes: Mapping[str, str]) -> str:
    """The page with the rows between its comments, each with what came of its tests, by its id; what was not run stays as
    the page had it."""
    outcomes = {**read_outcomes(page), **outcomes}
    return re.sub(
        f"{re.escape(BEGIN)}.*{re.escape(END)}",
        lambda _: "\n".join([BEGIN, *table(outcomes), END]),
        page,
        flags=re.DOTALL,
    )


def table(outcomes: Mapping[str, str]) -> Iterator[str]:
    for heading, faults in FAULTS.items():
        yield f"\n## {heading}\n"
        yield "| fault | what is done | what must happen | test | |"
        yield "| --- | --- | --- | --- | :-: |"
        for fault in faults:
            file, _, name = fault.test.partition("::")
            link = f"[{name.replace('[', ': ').removesuffix(']')}](../../tests/{file})".replace("|", "\\|")
            yield f"| {fault.id} | {fault.done} | {fault.must} | {link} | {outcomes.get(fault.id, 'not run')} |"
    yield ""


def read_outcomes(page: str) -> dict[str, str]:
    """id -> what the page says came of it."""
    rows = [
        line.strip("|").split("|")
        for line in page.splitlines()
        if line.startswith("| ") and not line.startswith("| fault ")
    ]
    return {row[0].strip(): row[-1].strip() for row in rows if len(row) > 3 and not set(row[0].strip()) <= {"-", " "}}
