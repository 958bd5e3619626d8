//! The kernels of all ops, as one table: each function is looked up once, when the device is opened.

use super::{driver::Kernel, ops};

/// Declares the kernels of one `.cu` file: a `KERNELS` table, and for each kernel a function that launches it with typed
/// arguments.
macro_rules! kernels {
    (file $file:literal; $($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?);)+) => {
        /// The kernels of this file.
        pub(in crate::cuda) static KERNELS: &[$crate::cuda::driver::Kernel] = {
            // A static of its own, and not a literal behind the reference: only a static has one address in the whole program,
            // and drivers look kernels up by it.
            static ENTRIES: [$crate::cuda::driver::Kernel; [$(stringify!($name)),+].len()] = [$(
                $crate::cuda::driver::Kernel {
                    file: $file,
                    name: stringify!($name),
                    parameter_sizes: &[$(size_of::<$type>()),*],
                }
            ),+];
            &ENTRIES
        };
        $crate::cuda::table::kernels!(@launch 0usize; $($(#[$doc])* fn $name($($arg: $type),*);)+);
    };
    (@launch $index:expr; $(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*); $($rest:tt)*) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// See [`crate::cuda::driver::Driver::launch`].
        #[allow(clippy::too_many_arguments)]
        unsafe fn $name(
            driver: &dyn $crate::cuda::driver::Driver,
            config: $crate::cuda::driver::LaunchConfig,
            $($arg: $type),*
        ) -> $crate::cuda::driver::Result<()> {
            $(let mut $arg = $arg;)*
            let mut arguments = [$((&raw mut $arg).cast::<std::ffi::c_void>()),*];
            // SAFETY: one argument per parameter of the table; the rest is the caller's promise.
            unsafe { driver.launch(&KERNELS[$index], config, &mut arguments) }
        }
        $crate::cuda::table::kernels!(@launch $index + 1usize; $($rest)*);
    };
    (@launch $index:expr;) => {};
}
pub(in crate::cuda) use kernels;

/// Every kernel there is.
pub fn all() -> impl Iterator<Item = &'static Kernel> {
    ops::TABLES.iter().flat_map(|table| table.iter())
}
