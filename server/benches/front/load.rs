//! The clients: as little work per token as can be, so that the cores are the server's.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tidemill_proto::v1::{
    ChatMessage, ChatPrompt, GenerateRequest, SamplingParams, generate_request::Prompt,
    inference_client::InferenceClient,
};
use tokio::{io::Interest, net::TcpStream, runtime};
use tonic::transport::{Channel, Endpoint};

use crate::{Result, STREAMS, TOKENS};

/// Connections of the gRPC client; gateways share few among many streams.
const CHANNELS: usize = 4;
const QUESTION: &str = "What is a KV cache?";

/// A way to the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// None: within the server's process.
    Alone,
    /// `tidemill.v1`.
    Grpc,
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
    /// `/predict`, raw text.
    Predict,
}

impl Protocol {
    pub const ALL: [Self; 5] = [Self::Alone, Self::Grpc, Self::Chat, Self::Completions, Self::Predict];

    pub fn name(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Grpc => "grpc",
            Self::Chat => "chat",
            Self::Completions => "completions",
            Self::Predict => "predict",
        }
    }

    /// The request as it goes over the connection.
    fn request(self) -> Vec<u8> {
        let messages = json!([{"role": "user", "content": QUESTION}]);
        let (path, mut body) = match self {
            Self::Chat => ("/v1/chat/completions", json!({ "messages": messages })),
            Self::Completions => ("/v1/completions", json!({ "prompt": QUESTION })),
            Self::Predict => ("/predict", json!({ "messages": messages })),
            Self::Alone | Self::Grpc => unreachable!("no HTTP"),
        };
        body["stream"] = Value::Bool(true);
        body["max_tokens"] = TOKENS.into();
        body["ignore_eos"] = Value::Bool(true);
        let body = body.to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        (head + &body).into_bytes()
    }
}

/// Clients at work on a thread of their own, until dropped.
pub struct Load {
    tokens: Arc<AtomicU64>,
    /// A client has failed, and the rest means nothing.
    broken: Arc<AtomicBool>,
    runtime: Option<runtime::Runtime>,
}

impl Load {
    pub fn start(protocol: Protocol, [grpc, http]: [SocketAddr; 2]) -> Result<Self> {
        let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (tokens, broken) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let channels = (0..CHANNELS).map(|_| {
            let _context = runtime.enter();
            Ok(Endpoint::from_shared(format!("http://{grpc}"))?.connect_lazy())
        });
        let channels: Vec<Channel> = channels.collect::<Result<_>>()?;
        for number in 0..STREAMS {
            let (tokens, broken) = (tokens.clone(), broken.clone());
            let channel = channels[number % CHANNELS].clone();
            runtime.spawn(async move {
                let ended = match protocol {
                    Protocol::Grpc => over_grpc(channel, &tokens).await,
                    _ => over_http(http, &protocol.request(), &tokens).await,
                };
                if let Err(error) = ended {
                    eprintln!("a client failed: {error}");
                    broken.store(true, Relaxed);
                }
            });
        }
        Ok(Self { tokens, broken, runtime: Some(runtime) })
    }

    /// Tokens that have arrived so far.
    pub fn tokens(&self) -> Result<u64> {
        if self.broken.load(Relaxed) { Err("a client failed".into()) } else { Ok(self.tokens.load(Relaxed)) }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // The clients are gone before the server is, or they would complain.
        let runtime = self.runtime.take().into_iter();
        runtime.for_each(|runtime| runtime.shutdown_timeout(Duration::from_secs(1)));
    }
}

async fn over_grpc(channel: Channel, tokens: &AtomicU64) -> Result<()> {
    let mut client = InferenceClient::new(channel);
    let message = ChatMessage { role: "user".into(), content: QUESTION.into(), ..ChatMessage::default() };
    let chat = ChatPrompt { messages: vec![message], ..ChatPrompt::default() };
    let sampling = SamplingParams { max_tokens: Some(TOKENS), ignore_eos: true, ..SamplingParams::default() };
    let request = GenerateRequest {
        prompt: Some(Prompt::Chat(chat)),
        sampling: Some(sampling),
        ..GenerateRequest::default()
    };
    loop {
        let mut stream = client.generate(request.clone()).await?.into_inner();
        while let Some(message) = stream.message().await? {
            tokens.fetch_add(message.token_ids.len() as u64, Relaxed);
        }
    }
}

async fn over_http(server: SocketAddr, request: &[u8], tokens: &AtomicU64) -> Result<()> {
    let stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; 16 << 10];
    loop {
        assert_eq!(stream.try_write(request)?, request.len(), "a request fits into the socket's buffer");
        let mut answer = Counter::default();
        while !answer.is_over() {
            stream.ready(Interest::READABLE).await?;
            match stream.try_read(&mut buffer) {
                Ok(0) => return Err("the server closed the connection".into()),
                Ok(read) => drop(tokens.fetch_add(answer.read(&buffer[..read])?, Relaxed)),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Counts the tokens of an answer: each is a word with a space before it, and nothing else has spaces but `data: `.
#[derive(Default)]
struct Counter {
    head: Vec<u8>,
    in_body: bool,
    /// The last bytes.
    end: [u8; 5],
}

impl Counter {
    fn is_over(&self) -> bool {
        self.in_body && &self.end == b"0\r\n\r\n"
    }

    fn read(&mut self, mut bytes: &[u8]) -> Result<u64> {
        if !self.in_body {
            self.head.extend_from_slice(bytes);
            let Some(end) = self.head.windows(4).position(|end| end == b"\r\n\r\n") else { return Ok(0) };
            if !self.head.starts_with(b"HTTP/1.1 200") {
                return Err(String::from_utf8_lossy(&self.head).into_owned().into());
            }
            self.in_body = true;
            bytes = &bytes[bytes.len() - (self.head.len() - end - 4)..];
        }
        let spaces = bytes.iter().filter(|&&byte| byte == b' ').count();
        // A colon before a space is of `data: `.
        let marks = bytes.windows(2).filter(|pair| pair == b": ").count();
        let cut = usize::from(self.end[4] == b':' && bytes.first() == Some(&b' '));
        let last = bytes.len().min(5);
        self.end.rotate_left(last);
        self.end[5 - last..].copy_from_slice(&bytes[bytes.len() - last..]);
        Ok((spaces - marks - cut) as u64)
    }
}
