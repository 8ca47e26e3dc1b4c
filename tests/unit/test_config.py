from __future__ import annotations

from pathlib import Path

import pytest

from fourdh_batch.config import describe_settings, load_config, require, to_dict, to_yaml
from fourdh_batch.errors import ConfigError


def test_file_and_words_are_merged_and_words_win(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("dataset: ava\ntracker:\n  max_age: 30\n  n_init: 3\n")
    config = load_config(file, ["tracker.max_age=20", "hmr.device=cpu"])
    assert (config.dataset, config.tracker.max_age, config.tracker.n_init) == ("ava", 20, 3)
    assert config.hmr.device == "cpu"


def test_every_mistake_is_listed_at_once() -> None:
    words = [
        "detektor.name=x",
        "video.chunk_frames=many",
        "tracker.gate=yes",
        "plan.videos_per_shard=0",
        "no-equals-sign",
        "video.decoder=decord",
    ]
    with pytest.raises(ConfigError, match="wrong settings") as caught:
        load_config(None, words)
    text = str(caught.value)
    assert "did you mean detector.name?" in text
    for key in ("video.chunk_frames", "tracker.gate", "plan.videos_per_shard", "no-equals-sign"):
        assert key in text
    assert "video.decoder: expected auto or pyav" in text


@pytest.mark.parametrize(
    "path", ["/a b/c #1.mp4", "/x/${HOME}.mp4", "s3://b/k?x=1,2", "/data/[1, 2].mp4", "123", "a=b"]
)
def test_a_path_is_taken_to_the_letter(path: str) -> None:
    assert load_config(None, [f"input={path}"]).input == path


def test_the_size_of_given_frames_is_a_width_and_a_height() -> None:
    assert load_config(None, ["poses.image_size=1280x720"]).poses.image_size_px == (1280, 720)
    assert load_config(None).poses.image_size_px is None
    for size in ("big", "0x720", "1280x", "1280x-7", "1x2x3", "٣x٤"):
        with pytest.raises(ConfigError, match=r"poses\.image_size: expected WIDTHxHEIGHT"):
            load_config(None, [f"poses.image_size={size}"])


def test_missing_settings_say_how_to_give_them() -> None:
    with pytest.raises(ConfigError, match=r"give output=\.\.\. \(root of the tables"):
        require(load_config(None, ["input=/x"]), "input", "output")


def test_a_saved_configuration_loads_to_the_same_values(tmp_path: Path) -> None:
    config = load_config(None, ["input=/x/${y} #z", "tracker.max_age=7"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert to_dict(load_config(file)) == to_dict(config)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")
    for text in ("a: [1", "- 1\n- 2\n"):
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"bad\.yaml"):
            load_config(file)


def test_every_setting_is_explained() -> None:
    for line in describe_settings().splitlines():
        assert len(line.partition(": ")[2]) > 3, line


@pytest.mark.parametrize("word", ["tracker.gate=.inf", "cluster.progress_timeout_s=.nan"])
def test_infinite_numbers_are_refused(word: str) -> None:
    key = word.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{key}: expected a finite number"):
        load_config(None, [word])


@pytest.mark.parametrize("word", ["tracker.box_weight=2", "tracker.log_cost=true"])
def test_what_the_published_tracker_lacks_is_refused_with_compat(word: str) -> None:
    load_config(None, [word])
    with pytest.raises(ConfigError, match=rf"{word.partition('=')[0]}: .*with tracker\.compat"):
        load_config(None, [word, "tracker.compat=true"])


def test_shares_of_a_gpu_must_fit_on_one_where_trackers_use_it() -> None:
    words = ["cluster.trackers_per_actor=2"]
    load_config(None, words)  # without a network they take none
    with pytest.raises(ConfigError, match=r"at most 1 together, got '0\.9 \+ 2 x 0\.1'"):
        load_config(None, [*words, "tracker.predictor_weights=p.safetensors"])
    words += [
        "tracker.predictor_weights=p.safetensors",
        "cluster.gpus_per_tracker=0.05",
    ]
    load_config(None, words)


@pytest.mark.parametrize("key", ["hmr.device", "tracker.device"])
def test_devices_are_checked(key: str) -> None:
    assert load_config(None, [f"{key}=cuda:1"])
    with pytest.raises(ConfigError, match=f"{key}: expected auto, cpu or cuda, got 'cuda:zz'"):
        load_config(None, [f"{key}=cuda:zz"])
