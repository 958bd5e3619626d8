//! The binary as people and supervisors meet it: messages, exit codes, signals.

#![allow(clippy::unwrap_used)]
#![cfg(unix)]

mod common;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    process::{Child, ChildStdout, Command, Output, Stdio},
    time::{Duration, Instant},
};

use common::{endless, greedy, text};
use tidemill_proto::v1::{FinishReason, GenerateRequest, inference_client::InferenceClient};
use tonic::Code;

fn tidemill(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidemill"));
    // The environment of whoever runs the tests must not decide.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TIDEMILL_")) {
        command.env_remove(name);
    }
    // Tests run side by side, and the default port is one.
    command.env("TIDEMILL_PORT", "0");
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn output(args: &[&str]) -> Output {
    tidemill(args).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Exit code, one line on stderr, and words in it.
#[track_caller]
fn fails(args: &[&str], code: i32, words: &[&str]) {
    let output = output(args);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
    assert!(text.contains("error: "), "{args:?}: {text}");
    for word in words {
        assert!(text.contains(word), "{args:?} does not say {word:?}: {text}");
    }
}

#[test]
fn wrong_usage_is_2_and_says_what_to_do() {
    fails(&["serve", "--frobnicate"], 2, &["--frobnicate"]);
    fails(&["serve", "--gpu-memory-utilization", "1.5"], 2, &["--gpu-memory-utilization", "at most 1"]);
    fails(&["serve", "--max-num-seqs", "0"], 2, &["--max-num-seqs"]);
    fails(&["serve", "--max-num-seqs", "many"], 2, &["--max-num-seqs"]);
    fails(&["serve", "--kv-cache-memory", "4 parsecs"], 2, &["--kv-cache-memory", "4GiB"]);
    fails(&["serve", "--device", "cuda:99"], 2, &["--device cpu"]);
    fails(&["serve", "--device", "cuda:x"], 2, &["cuda:N"]);
    fails(&["serve", "--dtype", "int3"], 2, &["bfloat16", "float32"]);
    fails(&["serve", "--tool-call-parser", "xml"], 2, &["hermes", "llama3_json", "mistral"]);
    fails(&["serve", "--reasoning-parser", "deep"], 2, &["think", "deepseek_r1"]);
    fails(&["serve", "--allowed-origins", "a\nb", "--grpc-port", "0"], 2, &["--allowed-origins"]);
    fails(&["gateway"], 2, &["--engine"]);
    fails(&["gateway", "--engine", "ftp://host:1"], 2, &["--engine", "https://HOST:PORT"]);
    fails(&["gateway", "--engine", "host:1", "--host", "0.0.0.0"], 2, &["--api-key", "--insecure-bind"]);
    fails(&["serve", "--host", "0.0.0.0"], 2, &["--api-key", "--insecure-bind"]);
    fails(&["serve", "--host", "no.such.host.invalid"], 2, &["--host"]);
    fails(&["serve", "--api-key", "with space"], 2, &["--api-key"]);
    fails(&["serve", "--tls-cert", "cert.pem"], 2, &["--tls-key"]);
    fails(
        &["serve", "--tls-cert", "/nonexistent.pem", "--tls-key", "/nonexistent.pem"],
        2,
        &["/nonexistent.pem"],
    );
    fails(&["serve", "--log-level", "info,,=x=y"], 2, &["--log-level"]);
    fails(&["serve", "--shutdown-timeout", "-1"], 2, &["--shutdown-timeout"]);
    for seconds in ["0", "-1", "1e18", "soon"] {
        fails(&["serve", "--keepalive-interval", seconds], 2, &["--keepalive-interval"]);
        fails(&["serve", "--keepalive-timeout", seconds], 2, &["--keepalive-timeout"]);
    }
    fails(&["serve", "--max-model-len", "5000"], 2, &["--max-model-len", "1024"]);
    fails(&["serve", "--kv-cache-memory", "1"], 2, &["--kv-cache-memory"]);
    fails(&["run"], 2, &["PROMPT"]);
    fails(&["run", "x", "--temperature", "-1"], 2, &["--temperature"]);
    fails(&["run", "x", "--max-tokens", "100000"], 2, &["--max-tokens"]);
    fails(&["run", "--raw", ""], 2, &["the prompt is empty"]);
}

#[test]
fn options_of_the_scheduler_are_checked_before_a_model_is_loaded() {
    fails(&["serve", "--scheduling-policy", "lottery"], 2, &["fcfs", "priority", "fair"]);
    fails(&["serve", "--tenant-weight", "fox=2"], 2, &["--tenant-weight", "--scheduling-policy fair"]);
    let fair = |weight| ["serve", "--scheduling-policy", "fair", "--tenant-weight", weight];
    for wrong in ["fox", "=2", "fox=0", "fox=1001", "fox=1.5", "fox=2,fox=3"] {
        fails(&fair(wrong), 2, &["--tenant-weight"]);
    }
    let contradiction = ["serve", "--no-enable-prefix-caching", "--enable-kv-cache-events"];
    fails(&contradiction, 2, &["--no-enable-prefix-caching", "--enable-kv-cache-events"]);
    fails(&["serve", "--no-enable-prefix-caching", "--swap-space", "1GiB"], 2, &["--swap-space"]);
    fails(&["serve", "--swap-space", "4"], 2, &["--swap-space", "4GiB"]);
    for option in ["--long-prefill-token-threshold", "--max-num-queued-tokens", "--max-stream-buffer"] {
        fails(&["serve", option, "0"], 2, &[option]);
    }
    for option in ["--target-itl-ms", "--max-queue-time", "--slow-reader-timeout"] {
        for wrong in ["0", "-1", "NaN", "soon"] {
            fails(&["serve", option, wrong], 2, &[option]);
        }
    }
    fails(&["serve", "--otlp-endpoint", "localhost:4317"], 2, &["--otlp-endpoint", "http://"]);
}

#[test]
fn a_model_that_cannot_be_loaded_is_3_and_named() {
    fails(&["run", "--model", "/no/such/model", "x"], 3, &["/no/such/model", "no such folder"]);
    fails(&["serve", "--grpc-port", "0", "--model", "/no/such/model"], 3, &["/no/such/model"]);
    let dir = tempfile::tempdir().unwrap();
    fails(&["run", "--model", dir.path().to_str().unwrap(), "x"], 3, &["config.json"]);
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    std::fs::write(dir.path().join("model.safetensors"), "junk").unwrap();
    fails(&["run", "--model", dir.path().to_str().unwrap(), "x"], 3, &["config.json"]);
    fails(&["run", "--chat-template", "/no/such/template", "x"], 3, &["/no/such/template"]);
}

#[test]
fn a_taken_port_is_4() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    fails(&["serve", "--grpc-port", &port], 4, &[&port, "--grpc-port"]);
    fails(&["serve", "--grpc-port", "0", "--port", &port], 4, &[&port, "--port", "--no-http"]);
    fails(&["gateway", "--engine", "127.0.0.1:1", "--port", &port], 4, &[&port, "--port"]);
}

#[test]
fn help_shows_options_examples_and_exit_codes() {
    for args in [
        &["--help"][..],
        &["serve", "--help"],
        &["gateway", "--help"],
        &["run", "--help"],
        &["inspect", "--help"],
    ] {
        let output = output(args);
        let text = stdout(&output);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(text.contains("Examples:") && text.contains("Exit codes:"), "{args:?}: {text}");
    }
    let text = stdout(&output(&["serve", "--help"]));
    for option in [
        "--max-num-batched-tokens",
        "--tls-client-ca",
        "--insecure-bind",
        "--scheduling-policy",
        "--no-enable-prefix-caching",
        "--otlp-endpoint",
        "TIDEMILL_TENANT_WEIGHT",
        "TIDEMILL_MODEL",
        "[default: 50051]",
    ] {
        assert!(text.contains(option), "{option}: {text}");
    }
    assert!(stdout(&output(&["--version"])).starts_with("tidemill "));
}

#[test]
fn secrets_of_the_environment_do_not_stand_in_the_help() {
    let output = tidemill(&["serve", "--help"]).env("TIDEMILL_API_KEY", "hunter2").output().unwrap();
    assert!(!stdout(&output).contains("hunter2"));
}

#[test]
fn run_streams_an_answer_and_reports_only_when_asked() {
    let quiet = output(&["run", "What is a KV cache?", "--temperature", "0"]);
    assert_eq!(quiet.status.code(), Some(0), "{}", stderr(&quiet));
    assert!(
        stdout(&quiet).contains("keys and values") && stdout(&quiet).ends_with('\n'),
        "{}",
        stdout(&quiet)
    );
    assert_eq!(stderr(&quiet), "");
    let verbose = output(&["run", "What is a KV cache?", "--temperature", "0", "--verbose"]);
    assert_eq!(stdout(&verbose), stdout(&quiet));
    assert!(stderr(&verbose).contains("tokens/s"), "{}", stderr(&verbose));
}

#[test]
fn run_reads_stdin_and_completes_raw_text_with_a_seed_and_a_stop_string() {
    let args =
        ["run", "-", "--raw", "--seed", "3", "--temperature", "0.8", "--max-tokens", "40", "--stop", "."];
    let answer = || {
        let mut child = tidemill(&args).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"Once upon a time").unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stdout(&output)
    };
    let first = answer();
    assert!(first.len() > 5 && !first.contains('.'), "{first:?}");
    assert_eq!(first, answer(), "same seed, same answer");
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = tidemill(&["run", "--raw", "Once upon a time", "--max-tokens", "900"]).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}

#[test]
fn the_demonstration_streams_aborts_and_ends_with_every_block_free() {
    let started = Instant::now();
    let output = output(&[]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}{}", stderr(&output));
    for word in [
        "Control.Abort(\"endless\") took effect in decode",
        "0 of 4096 in use",
        "tokens/s",
        "aborted",
        "tidemill serve",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert!(!text.contains('\x1b'), "no colours outside of terminals");
    assert!(started.elapsed() < Duration::from_secs(20));
}

/// A `tidemill serve` child; killed when dropped.
struct Serving {
    child: Child,
    stdout: BufReader<ChildStdout>,
    address: String,
}

impl Serving {
    fn start(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let address =
            line.strip_prefix("listening on ").unwrap_or_else(|| panic!("{line:?}")).trim().to_owned();
        line.clear();
        stdout.read_line(&mut line).unwrap();
        assert!(line.starts_with("listening on http://127.0.0.1:"), "{line:?}");
        Self { child, stdout, address }
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    /// Exit code and log.
    fn end(mut self) -> (Option<i32>, String) {
        let mut log = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        let code = self.child.wait().unwrap().code();
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "", "nothing else on stdout");
        (code, log)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[tokio::test]
async fn sigterm_lets_the_running_finish_and_exits_0() {
    let serving = Serving::start(&mut tidemill(&[
        "serve",
        "--grpc-port",
        "0",
        "--log-format",
        "json",
        "--max-num-seqs",
        "8",
    ]));
    let mut client = InferenceClient::connect(format!("http://{}", serving.address)).await.unwrap();
    let request =
        text("Once upon a time", tidemill_proto::v1::SamplingParams { ignore_eos: true, ..greedy(600) });
    let mut stream = client.generate(request).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    serving.signal("TERM");
    let mut last = None;
    while let Some(message) = stream.message().await.unwrap() {
        last = Some(message);
    }
    let last = last.unwrap();
    assert_eq!((last.finish_reason(), last.usage.unwrap().completion_tokens), (FinishReason::Length, 600));
    let (code, log) = tokio::task::spawn_blocking(|| serving.end()).await.unwrap();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("\"finished\":1,\"cut_off\":0"), "{log}");
    assert!(log.lines().all(|line| line.starts_with('{')), "every line is JSON: {log}");
    assert!(!log.contains("Once upon"), "prompts are not logged");
}

#[tokio::test]
async fn a_request_is_one_line_of_the_log_and_a_collector_that_is_away_is_one_warning() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let endpoint = format!("http://{closed}");
    let options = ["serve", "--grpc-port", "0", "--log-format", "json", "--otlp-endpoint", &endpoint];
    let serving = Serving::start(&mut tidemill(&options));
    let mut client = InferenceClient::connect(format!("http://{}", serving.address)).await.unwrap();
    for id in ["life-one", "life-two"] {
        let tenant = "fox\nforged line".to_owned();
        let request =
            GenerateRequest { request_id: id.into(), tenant, ..text("Once upon a time", greedy(5)) };
        common::collect(client.generate(request).await.unwrap().into_inner()).await.unwrap();
        // Longer than spans wait for others to be sent with: two exports fail, or one and its repetition.
        tokio::time::sleep(Duration::from_millis(600)).await;
    }
    serving.signal("TERM");
    let (code, log) = tokio::task::spawn_blocking(|| serving.end()).await.unwrap();
    assert_eq!(code, Some(0), "{log}");
    for id in ["life-one", "life-two"] {
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(id)).collect();
        let [line] = lines[..] else { panic!("{id}: {lines:?}") };
        for word in [
            "\"message\":\"request\"",
            "\"outcome\":\"length\"",
            "\"completion_tokens\":5",
            "queue_ms",
            "prefill_ms",
            "decode_ms",
        ] {
            assert!(line.contains(word), "{word}: {line}");
        }
        assert!(line.contains("fox") && !line.contains("parked_ms"), "{line}");
    }
    assert!(log.lines().all(|line| line.starts_with('{')), "no line is forged: {log}");
    assert_eq!(log.matches("traces cannot be exported").count(), 1, "{log}");
}

#[tokio::test]
async fn what_outlasts_the_shutdown_timeout_ends_unavailable_and_a_second_signal_is_immediate() {
    for (timeout, signals, code) in [("0.1", 1, 0), ("60", 2, 130)] {
        let serving = Serving::start(&mut tidemill(&[
            "serve",
            "--grpc-port",
            "0",
            "--shutdown-timeout",
            timeout,
            "--max-num-seqs",
            "1",
        ]));
        let mut client = InferenceClient::connect(format!("http://{}", serving.address)).await.unwrap();
        let mut stream = client.generate(endless("long")).await.unwrap().into_inner();
        stream.message().await.unwrap().unwrap();
        let started = Instant::now();
        for _ in 0..signals {
            serving.signal("INT");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let end = loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("ended well"),
                Err(status) => break status.code(),
            }
        };
        // A server that ends at once says nothing more; the client sees its connection break.
        assert!(signals == 2 || end == Code::Unavailable, "{end:?}");
        let (exit, log) = tokio::task::spawn_blocking(|| serving.end()).await.unwrap();
        assert_eq!(exit, Some(code), "{log}");
        assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    }
}

#[test]
fn the_command_line_wins_over_the_environment_and_that_over_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tidemill.toml");
    let file = "grpc-port = 0\nserved-model-name = \"file\"\nmax-num-seqs = 3\nmax-model-len = 100\nlog-level = \"info\"\n\
                kv-cache-memory = \"16MiB\"\napi-key = [\"a\", \"b\"]\ninsecure-bind = true\nshutdown-timeout = 1.5\n\
                scheduling-policy = \"fair\"\ntenant-weight = [\"fox=2\", \"a=b=3\"]\nno-enable-prefix-caching = true\ntarget-itl-ms = 12.5\n";
    std::fs::write(&path, file).unwrap();
    let mut command = tidemill(&["serve", "--config", path.to_str().unwrap(), "--max-model-len", "300"]);
    command.env("TIDEMILL_MAX_MODEL_LEN", "200").env("TIDEMILL_MAX_NUM_SEQS", "5");
    let serving = Serving::start(&mut command);
    serving.signal("TERM");
    let (code, log) = serving.end();
    assert_eq!(code, Some(0), "{log}");
    for word in ["max_model_len=300", "max_num_seqs=5", "model=\"file\"", "grace_seconds=1.5"] {
        assert!(log.contains(word), "{word}: {log}");
    }
}

#[test]
fn mistakes_in_the_file_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.toml");
    let path = path.to_str().unwrap();
    fails(&["serve", "--config", path], 2, &[path]);
    for (content, word) in [
        ("modle = \"x\"", "modle"),
        ("max-num-seqs = \"many\"", "max-num-seqs"),
        ("max-num-seqs = [1, 2]", "max-num-seqs"),
        ("host = ", "bad.toml"),
        ("config = \"other.toml\"", "config"),
        ("[model]\npath = \"x\"", "model"),
    ] {
        std::fs::write(path, content).unwrap();
        fails(&["serve", "--config", path], 2, &[path, word]);
    }
}

#[test]
fn ctrl_c_ends_an_answer_on_the_way() {
    // So hot that every token is as likely as the end: the answer is long.
    let args = [
        "run",
        "--raw",
        "Once",
        "--temperature",
        "100",
        "--seed",
        "4",
        "--max-tokens",
        "1000",
        "--threads",
        "1",
    ];
    let mut child = tidemill(&args).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 8]).unwrap();
    assert!(Command::new("kill").args(["-s", "INT", &child.id().to_string()]).status().unwrap().success());
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(stderr(&output).contains("SIGINT") && rest.ends_with(b"\n"), "{}", stderr(&output));
}
