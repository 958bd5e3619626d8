//! The `tidemill` binary: reads the command line and leaves with an exit code. Everything else is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidemill::main()
}
