//! The wire: types, clients and servers generated from the `.proto` files of this crate.

/// `tidemill.v1`: Tidemill's own protocol. See `tidemill/v1/tidemill.proto` for its rules.
pub mod v1 {
    #![allow(missing_docs, clippy::doc_markdown, clippy::large_enum_variant, unused_qualifications)]
    tonic::include_proto!("tidemill.v1");
}

/// The SMG gateway's protocols, as far as Tidemill speaks them.
#[allow(missing_docs, clippy::doc_markdown, clippy::large_enum_variant, unused_qualifications)]
pub mod smg {
    pub mod grpc {
        pub mod common {
            tonic::include_proto!("smg.grpc.common");
        }
    }
}

/// `vllm.grpc.engine`, by which the SMG gateway speaks to vLLM; Tidemill answers to it too. See `vllm/grpc/engine/vllm_engine.proto`.
#[allow(missing_docs, clippy::doc_markdown, clippy::large_enum_variant, unused_qualifications)]
pub mod vllm {
    pub mod grpc {
        pub mod engine {
            tonic::include_proto!("vllm.grpc.engine");
        }
    }
}

/// Encoded `FileDescriptorSet` of everything above, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
