//! Model folders made to harm. Whatever stands in them: an error that names the file, no panic, no more memory than a bound, and the process goes on to
//! load the next model.

#![allow(clippy::unwrap_used)]

mod config;
mod rig;
mod tokenizer;
mod weights;
