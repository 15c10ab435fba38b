from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import ValidationError

from loramux_server.config.load import OTHER_VARIABLES, TABLES, all_settings, load
from loramux_server.config.serve import ServeConfig, is_loopback
from loramux_server.config.settings import Settings, settings_of
from loramux_server.config.train import TrainConfig
from loramux_server.errors import ConfigError


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "loramux.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_without_any_setting_everything_has_its_default() -> None:
    config = load(ServeConfig, {}, {})

    assert config == ServeConfig()
    assert (config.host, config.port, config.device) == ("127.0.0.1", 8000, "auto")
    assert config.adapter_dir == Path("adapters-store")


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(tmp_path: Path) -> None:
    file = written(tmp_path, "[serve]\nport = 1111\nmax_num_seqs = 11\nmax_waiting = 12\n")
    environ = {"LORAMUX_PORT": "2222", "LORAMUX_MAX_NUM_SEQS": "22"}

    config = load(ServeConfig, {"port": "3333"}, environ, file)

    assert (config.port, config.max_num_seqs, config.max_waiting, config.max_lora_rank) == (3333, 22, 12, 256)


def test_the_config_file_can_be_named_by_flag_or_environment_and_the_flag_wins(tmp_path: Path) -> None:
    file = written(tmp_path, "[serve]\nport = 1111\n")

    assert load(ServeConfig, {}, {"LORAMUX_CONFIG": file}).port == 1111
    assert load(ServeConfig, {}, {"LORAMUX_CONFIG": "/does/not/exist.toml"}, file).port == 1111


def test_every_field_can_be_set_by_flag_environment_and_file(tmp_path: Path) -> None:
    samples = {int: ("64", "64"), float: ("64", "64"), str: ("cuda", '"cuda"'), Path: ("some/dir", '"some/dir"')}
    particular = {
        "log_level": ("debug", '"debug"'),
        "host": ("127.0.0.2", '"127.0.0.2"'),
        "cors_origins": ("https://a.example,http://localhost:3000", '"https://a.example,http://localhost:3000"'),
        "hub_adapters": ("acme/spam,other/*", '"acme/spam,other/*"'),
    }
    for name, setting in settings_of(ServeConfig).items():
        switched = str(not setting.default).lower()
        text, in_toml = particular.get(name, samples.get(setting.kind, (switched, switched)))
        from_environment = load(ServeConfig, {}, {setting.variable: text})
        from_file = load(ServeConfig, {}, {}, written(tmp_path, f"[serve]\n{name} = {in_toml}\n"))

        assert from_environment == from_file != ServeConfig()
        if not setting.secret:
            assert load(ServeConfig, {name: text}, {}) == from_environment


def test_an_integer_in_the_file_is_fine_where_a_number_is_asked_for(tmp_path: Path) -> None:
    config = load(ServeConfig, {}, {}, written(tmp_path, "[serve]\nshutdown_timeout = 5\n"))

    assert isinstance(config.shutdown_timeout, float)
    assert config.shutdown_timeout == 5.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": "70000"}, "--port must be from 0 to 65535, not 70000"),
        ({"port": "-1"}, "--port must be from 0 to 65535, not -1"),
        ({"port": "http"}, "--port must be a whole number, not 'http'"),
        ({"port": "8000.0"}, "--port must be a whole number, not '8000.0'"),
        ({"max_num_seqs": "0"}, "--max-num-seqs must be from 1 to 4096"),
        ({"shutdown_timeout": "nan"}, "--shutdown-timeout must be from 0 to 86400, not nan"),
        ({"shutdown_timeout": "inf"}, "--shutdown-timeout must be from 0 to 86400, not inf"),
        ({"device": "cudaa"}, "--device must be one of auto, cpu, cuda, not 'cudaa'; did you mean cuda?"),
        ({"log_level": "chatty"}, "--log-level must be one of debug, info, warning, error"),
        ({"base": ""}, "--base and --host must not be empty"),
        ({"served_model_name": "a:b"}, "--served-model-name must start with a letter or digit"),
        (
            {"adapter_memory_mib": "64", "device_memory_mib": "64"},
            "--device-memory-mib 64 leaves nothing for the KV cache",
        ),
        ({"cors_origins": "https://a.example/"}, "--cors-origins lists pages as scheme://host or scheme://host:port"),
        ({"cors_origins": "a.example"}, "without a path, not 'a.example'"),
        (
            {"hub_adapters": "acme/*", "served_model_name": "hub"},
            "--served-model-name hub does not go with --hub-adapters",
        ),
        (
            {"hub_adapters": "acme/spam,acme"},
            "--hub-adapters lists repositories as owner/name, with * for any characters, not",
        ),
        ({"allowed_hosts": "host.docker.internal:8000"}, "--allowed-hosts lists names of this machine, without a port"),
        (
            {"max_batch_tokens": "16", "max_num_seqs": "32"},
            "--max-batch-tokens (16) must be at least --max-num-seqs (32)",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_the_flag_and_what_is_allowed(flags: Mapping[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(ServeConfig, flags, {})

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[serve]\nprot = 1\n", "unknown key prot in [serve]; did you mean port?"),
        ("port = 1\n", "unknown key port outside any table; settings belong under [serve]"),
        ("[server]\nport = 1\n", "unknown table [server]; settings belong under [serve]"),
        ('[serve]\nport = "8000"\n', "key port: --port must be a whole number, not '8000'"),
        ("[serve]\nport = true\n", "key port: --port must be a whole number, not True"),
        ("[serve]\nport = [1]\n", "key port: --port must be a whole number"),
        ("[serve\n", "is not valid TOML"),
    ],
)
def test_a_wrong_config_file_is_refused_with_the_key_and_what_was_meant(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(ServeConfig, {}, {}, written(tmp_path, text))

    assert message in str(caught.value)


def test_a_config_file_that_is_missing_or_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(ConfigError, match="cannot read the config file"):
        load(ServeConfig, {}, {}, str(tmp_path / "missing.toml"))
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load(ServeConfig, {}, {}, str(tmp_path / "binary.toml"))


def test_an_unknown_variable_of_our_prefix_is_refused_and_others_are_nobodys_business() -> None:
    with pytest.raises(ConfigError, match="unknown environment variable LORAMUX_PROT; did you mean LORAMUX_PORT?"):
        load(ServeConfig, {}, {"LORAMUX_PROT": "1"})

    ignored = {"PATH": "/bin", "PORT": "1"} | {"LORAMUX_URL": "http://127.0.0.1:8000"}
    assert load(ServeConfig, {}, ignored) == ServeConfig()
    assert "LORAMUX_URL" in OTHER_VARIABLES


def test_variables_that_kubernetes_sets_for_a_service_of_our_name_are_explained() -> None:
    for variable in ("LORAMUX_PORT", "LORAMUX_PORT_8000_TCP"):
        with pytest.raises(ConfigError, match="enableServiceLinks: false"):
            load(ServeConfig, {}, {variable: "tcp://10.0.0.1:8000"})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "localhost.example.org"])
def test_a_host_that_others_can_reach_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="refuses to start without a key"):
        load(ServeConfig, {"host": host}, {})

    assert load(ServeConfig, {"host": host}, {"LORAMUX_API_KEY": "k-123"}).host == host


def test_an_admin_key_alone_does_not_open_the_server_to_others() -> None:
    with pytest.raises(ConfigError, match="refuses to start without a key"):
        load(ServeConfig, {"host": "0.0.0.0"}, {"LORAMUX_ADMIN_KEY": "k-123"})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost", "LOCALHOST"])
def test_loopback_is_recognised_in_every_spelling(host: str) -> None:
    assert is_loopback(host)
    assert load(ServeConfig, {"host": host}, {}).api_key is None


@pytest.mark.parametrize("key", ["", " ", "two words", "schlüssel", "a\nb"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    for variable in ("LORAMUX_API_KEY", "LORAMUX_ADMIN_KEY"):
        with pytest.raises(ConfigError, match=f"{variable} must be printable ASCII") as caught:
            load(ServeConfig, {}, {variable: key})

        assert len(key) < 2 or key not in str(caught.value)


def test_keys_are_never_shown(tmp_path: Path) -> None:
    config = load(ServeConfig, {}, {"LORAMUX_API_KEY": "sesame", "LORAMUX_ADMIN_KEY": "sesame2"})

    assert "sesame" not in repr(config)
    with pytest.raises(ConfigError) as caught:
        load(ServeConfig, {}, {}, written(tmp_path, "[serve]\napi_key = 1234567\n"))
    assert "LORAMUX_API_KEY must be text" in str(caught.value)
    assert "1234567" not in str(caught.value)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        ServeConfig().port = 1  # type: ignore[misc]


def test_one_file_and_one_environment_serve_all_commands(tmp_path: Path) -> None:
    file = written(
        tmp_path, "[serve]\nport = 1111\n[train]\nrank = 4\nrslora = true\n[eval]\nlimit = 3\n[plan]\nseq = 64\n"
    )
    environ = {"LORAMUX_MAX_WAITING": "7", "LORAMUX_EPOCHS": "2", "LORAMUX_ONTO": "16bit", "LORAMUX_LIMIT": "5"}
    served = load(ServeConfig, {}, environ, file)
    assert (served.port, served.max_waiting) == (1111, 7)
    trained = load(TrainConfig, {"data": "x.jsonl", "name": "x"}, environ, file)
    assert (trained.rank, trained.rslora, trained.epochs) == (4, True, 2.0)
    with pytest.raises(ConfigError, match="unknown environment variable LORAMUX_EPOCH; did you mean"):
        load(TrainConfig, {}, {"LORAMUX_EPOCH": "2"})


@pytest.mark.parametrize(("text", "meant"), [("yes", True), ("True", True), ("0", False), ("no", False)])
def test_a_switch_is_set_in_words_in_the_environment(text: str, meant: bool) -> None:
    config = load(TrainConfig, {"data": "x.jsonl", "name": "x"}, {"LORAMUX_RSLORA": text})
    assert config.rslora is meant


def test_a_switch_that_is_neither_on_nor_off_is_refused() -> None:
    with pytest.raises(ConfigError, match="--rslora must be true or false, not 'maybe'"):
        load(TrainConfig, {"data": "x.jsonl", "name": "x"}, {"LORAMUX_RSLORA": "maybe"})


def test_a_number_is_text_on_the_command_line_alone() -> None:
    with pytest.raises(ConfigError, match="--port must be a whole number, not '8000'"):
        ServeConfig(port="8000")
    with pytest.raises(ConfigError, match="unknown setting prot; did you mean port?"):
        ServeConfig(prot=1)


def test_settings_made_directly_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_PORT", "1")

    assert ServeConfig().port == 8000


def test_every_command_has_a_table_of_its_own_and_says_what_each_setting_is() -> None:
    assert tuple(cls.table for cls in all_settings()) == TABLES
    for cls in all_settings():
        assert [setting.name for setting in settings_of(cls).values() if not setting.help or not setting.group] == []


@pytest.mark.parametrize("cls", all_settings())
def test_a_nul_is_refused_in_every_path_and_text(cls: type[Settings], tmp_path: Path) -> None:
    named = [setting for setting in settings_of(cls).values() if setting.kind in (str, Path) and not setting.choices]
    assert len(named) > 2
    for setting in named:
        label = setting.variable if setting.secret else setting.flag
        with pytest.raises(ConfigError, match=f"{label} must not hold a NUL"):
            load(cls, {}, {}, written(tmp_path, f'[{cls.table}]\n{setting.name} = "a\\u0000b"\n'))


def test_a_value_that_toml_knows_and_json_does_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="key port: --port must be a whole number, not 2026-01-01"):
        load(ServeConfig, {}, {}, written(tmp_path, "[serve]\nport = 2026-01-01\n"))


def test_a_date_is_no_text(tmp_path: Path) -> None:
    for name in ("base", "adapter_dir"):
        with pytest.raises(ConfigError, match="must be .*, not 2020-01-01"):
            load(ServeConfig, {}, {}, written(tmp_path, f"[serve]\n{name} = 2020-01-01\n"))


def test_a_file_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load(ServeConfig, {}, {}, written(tmp_path, "[serve]\nbase = " + "[" * 5000 + "]" * 5000 + "\n"))
