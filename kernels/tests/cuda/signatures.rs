//! The table of kernels and the compiled kernels agree on their parameters.

use std::{collections::BTreeSet, env, fs, path::PathBuf};

use tidemill_kernels::cuda::table;

#[test]
fn every_kernel_has_the_parameters_that_the_table_says() {
    for kernel in table::all() {
        let compiled = tidemill_kernels_emu::parameter_sizes(kernel.name);
        assert_eq!(compiled.as_deref(), Some(kernel.parameter_sizes), "{}", kernel.name);
    }
}

#[test]
fn every_kernel_file_is_in_the_table() {
    // At run time: the tests also run away from where they were built.
    let folder = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap()).join("cuda");
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files: BTreeSet<String> = paths
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    let table: BTreeSet<String> = table::all().map(|kernel| kernel.file.to_owned()).collect();
    assert_eq!(files, table);
}
