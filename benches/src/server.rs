//! A server of its own for a benchmark: the `tidemill` binary that was built beside it.

use std::{
    io::{self, BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

/// A `tidemill serve` child on a free port; stopped when dropped.
#[derive(Debug)]
pub struct ServerProcess {
    child: Child,
    /// `http://127.0.0.1:PORT`.
    pub address: String,
}

impl ServerProcess {
    /// Starts the binary beside the running executable with `serve --grpc-port 0 --no-http` and `args`, and reads its address from
    /// the line `listening on ADDRESS`.
    ///
    /// # Errors
    /// When the binary is missing, or ends before it listens.
    pub fn start(args: &[&str]) -> io::Result<Self> {
        Self::start_binary(&std::env::current_exe()?.with_file_name("tidemill"), args)
    }

    /// The same with the binary that stands there.
    ///
    /// # Errors
    /// As [`ServerProcess::start`].
    pub fn start_binary(binary: &Path, args: &[&str]) -> io::Result<Self> {
        let mut child = Command::new(binary)
            .args(["serve", "--grpc-port", "0", "--no-http"])
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| {
                let hint = "build it with `cargo build --release` first";
                io::Error::new(error.kind(), format!("{}: {error}; {hint}", binary.display()))
            })?;
        let stdout = child.stdout.take().ok_or_else(|| io::Error::other("no stdout"))?;
        for line in BufReader::new(stdout).lines() {
            if let Some(address) = line?.strip_prefix("listening on ") {
                return Ok(Self { child, address: format!("http://{}", address.trim()) });
            }
        }
        Err(io::Error::other(format!("the server ended with {} before it listened", child.wait()?)))
    }

    /// The process's id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

/// CPU time that a process has used, all its threads together: `utime` and `stime` of `/proc/PID/stat` (proc_pid_stat(5)).
///
/// # Errors
/// When there is no such process, or no such file system as on Linux.
pub fn cpu_time(process: u32) -> io::Result<Duration> {
    /// Linux counts here in USER_HZ, which is 100 on every architecture that the engine runs on.
    const TICK: Duration = Duration::from_millis(10);
    let path = format!("/proc/{process}/stat");
    let stat = std::fs::read_to_string(&path)?;
    // The second field is the program's name, in parentheses, and may hold anything; utime and stime are the 14th and 15th.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let ticks: Vec<u32> = fields.split_whitespace().skip(11).take(2).flat_map(str::parse).collect();
    match ticks[..] {
        [user, system] => Ok(TICK * user + TICK * system),
        _ => Err(io::Error::other(format!("{path} is not understood"))),
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
