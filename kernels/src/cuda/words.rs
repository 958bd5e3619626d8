//! Index tensors: arrays of u32 in device memory, most of them parts of a step's one metadata upload.

use std::marker::PhantomData;

use super::{
    driver::{DevPtr, Result},
    memory::DeviceMemory,
};
use crate::error::KernelError;

/// A part of device memory that holds u32.
#[derive(Clone, Copy)]
pub struct DeviceWords<'a> {
    ptr: DevPtr,
    words: usize,
    memory: PhantomData<&'a DeviceMemory>,
}

impl<'a> DeviceWords<'a> {
    /// All of `memory`.
    pub fn new(memory: &'a DeviceMemory) -> Self {
        Self { ptr: memory.ptr(), words: memory.bytes() / 4, memory: PhantomData }
    }

    /// Number of words.
    pub fn words(self) -> usize {
        self.words
    }

    /// `words` words from `first` on.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when they are not all there.
    pub fn part(self, first: usize, words: usize) -> Result<Self> {
        let end = first.checked_add(words).filter(|&end| end <= self.words);
        if end.is_none() {
            let what = format!("{words} words from word {first}");
            return Err(KernelError::Shape {
                op: "part",
                what,
                got: vec![self.words],
                expected: vec![first + words],
            });
        }
        Ok(Self { ptr: self.ptr.offset(4 * first), words, memory: PhantomData })
    }

    /// Where they begin, if there are at least `words`.
    ///
    /// # Errors
    /// [`KernelError::Shape`].
    pub fn at_least(self, op: &'static str, what: &str, words: usize) -> Result<DevPtr> {
        if self.words < words {
            return Err(KernelError::Shape {
                op,
                what: what.into(),
                got: vec![self.words],
                expected: vec![words],
            });
        }
        Ok(self.ptr)
    }
}
