//! What is found, and what is said when it cannot be used.

use tidemill_kernels::cuda::{
    driver::Driver,
    gpu::{GpuError, GpuOptions, Version, devices, open},
};

use crate::fake::{
    Fake,
    Libraries::{Broken, Fake as Both, NoNvrtc},
    has_usual_nvrtc, inside,
};

fn error() -> GpuError {
    Fake::open().1.err().unwrap()
}

#[test]
fn a_gpu_is_described_opened_and_given_back() {
    inside("open::a_gpu_is_described_opened_and_given_back", Both, &[("FAKE_CUDA_DEVICES", "2")], || {
        let names: Vec<String> = devices().unwrap().into_iter().map(|device| device.name).collect();
        assert_eq!(names, ["Fake 0", "Fake 1"]);
        let fake = Fake::new();
        let driver = open(1, &GpuOptions::default()).unwrap();
        let info = driver.info();
        assert_eq!((info.name.as_str(), info.compute_capability), ("Fake 1", (9, 0)));
        assert_eq!((info.num_sms, info.l2_bytes), (4, 1 << 20));
        assert_eq!((info.total_memory, info.max_shared_bytes), (256 << 20, 227 << 10));
        assert!(fake.log().contains("cuStreamCreate flags 1\n"), "a stream that waits for no other one");
        assert!(fake.live() > 0);
        drop(driver);
        assert_eq!(fake.live(), 0, "stream and modules are given back");
    });
}

#[test]
fn without_a_driver() {
    inside("open::without_a_driver", Broken, &[], || {
        assert_eq!(devices().unwrap_err(), GpuError::NoDriver);
        assert_eq!(open(0, &GpuOptions::default()).err().unwrap(), GpuError::NoDriver);
    });
}

#[test]
fn without_a_gpu() {
    inside("open::without_a_gpu", Both, &[("FAKE_CUDA_DEVICES", "0")], || {
        assert_eq!(error(), GpuError::NoDevice);
    });
}

#[test]
fn with_fewer_gpus_than_asked_for() {
    inside("open::with_fewer_gpus_than_asked_for", Both, &[("FAKE_CUDA_DEVICES", "2")], || {
        let error = open(2, &GpuOptions::default()).err().unwrap();
        assert_eq!(error, GpuError::BadOrdinal { ordinal: 2, count: 2 });
        assert!(error.to_string().contains("lists 2, numbered from 0"), "{error}");
    });
}

#[test]
fn with_a_driver_older_than_every_kernel() {
    let variables = [("FAKE_CUDA_VERSION", "11080")];
    inside("open::with_a_driver_older_than_every_kernel", Both, &variables, || {
        let (found, needed) = (Version { major: 11, minor: 8 }, Version { major: 12, minor: 0 });
        assert_eq!(error(), GpuError::DriverTooOld { found, needed });
    });
}

#[test]
fn with_no_kernels_for_the_driver() {
    let variables = [("FAKE_CUDA_VERSION", "12040")];
    inside("open::with_no_kernels_for_the_driver", NoNvrtc, &variables, || {
        if has_usual_nvrtc() {
            return println!("skipped: this machine has an NVRTC in a usual place");
        }
        let found = Version { major: 12, minor: 4 };
        // Which one depends on whether this build found an nvcc.
        match error() {
            GpuError::NvrtcMissing { driver } => assert_eq!(driver, found),
            GpuError::DriverTooOld { found: said, needed } => {
                assert_eq!(said, found);
                assert!(needed.major >= 13);
            }
            other => panic!("{other}"),
        }
    });
}

#[test]
fn with_a_gpu_older_than_the_kernels() {
    let variables = [("FAKE_CUDA_CAPABILITY", "75")];
    inside("open::with_a_gpu_older_than_the_kernels", Both, &variables, || {
        assert_eq!(error(), GpuError::UnsupportedDevice { name: "Fake 0".into(), capability: (7, 5) });
    });
}

#[test]
fn with_no_memory_for_a_context() {
    let variables = [("FAKE_CUDA_FAIL", "cuDevicePrimaryCtxRetain:2")];
    inside("open::with_no_memory_for_a_context", Both, &variables, || {
        assert_eq!(error(), GpuError::OutOfMemory { what: "cuDevicePrimaryCtxRetain" });
    });
}

#[test]
fn with_a_driver_that_does_not_match_its_kernel_module() {
    let variables = [("FAKE_CUDA_FAIL", "cuInit:803")];
    inside("open::with_a_driver_that_does_not_match_its_kernel_module", Both, &variables, || {
        let error = error();
        assert!(matches!(error, GpuError::Driver { call: "cuInit", .. }), "{error}");
        assert!(error.to_string().contains("FAKE_ERROR_803"), "{error}");
    });
}

#[test]
fn every_message_is_one_line_that_names_the_way_out() {
    let version = Version { major: 12, minor: 4 };
    let text = String::from;
    let errors = [
        GpuError::NoDriver,
        GpuError::DriverTooOld { found: version, needed: version },
        GpuError::NoDevice,
        GpuError::BadOrdinal { ordinal: 1, count: 1 },
        GpuError::UnsupportedDevice { name: text("T4"), capability: (7, 5) },
        GpuError::NvrtcMissing { driver: version },
        GpuError::NvrtcUnusable { detail: text("no symbol") },
        GpuError::NvrtcTooOld { version, arch: text("sm_120a") },
        GpuError::OutOfMemory { what: "cuModuleLoadData" },
        GpuError::Driver { call: "cuInit", detail: text("803") },
    ];
    for error in errors {
        let message = error.to_string();
        assert!(message.ends_with("use --device cpu") && !message.contains('\n'), "{message}");
        assert!(!message.contains("  "), "{message}");
    }
}
