//! Compiles the .proto files with protox, so no `protoc` is needed.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    const FILES: [&str; 2] = ["tidemill/v1/tidemill.proto", "vllm/grpc/engine/vllm_engine.proto"];
    for folder in ["tidemill", "vllm", "smg"] {
        println!("cargo::rerun-if-changed={folder}");
    }
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // Source comments stay out of the embedded set: reflection clients do not need them.
    let mut bare = descriptors.clone();
    bare.file.iter_mut().for_each(|file| file.source_code_info = None);
    fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&bare))?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
