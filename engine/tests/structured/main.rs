//! Answers of a given form, through the whole engine, on the built-in model.

#![allow(clippy::unwrap_used)]

mod company;
mod forms;
mod hostile;
mod rig;
mod thinking;
