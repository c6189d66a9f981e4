//! The private Python module `dump_activations._rust`: checks arguments, releases the interpreter,
//! maps errors.

use pyo3::prelude::*;

#[pymodule]
mod _rust {
    use std::ffi::OsString;
    use std::fs::File;
    use std::io;
    use std::mem::ManuallyDrop;
    use std::ops::Range;
    use std::os::fd::{FromRawFd, RawFd};
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use numpy::{
        PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadwriteArray2,
        PyUntypedArrayMethods,
    };
    use pyo3::exceptions::{PyMemoryError, PyOSError};
    use pyo3::prelude::*;
    use pyo3::types::{PyList, PyString};

    use crate::dataset::headers::Shards;
    use crate::dataset::layouts::{self, BoardField, CELLS, Layout};
    use crate::dataset::{self, scan::Columns};
    use crate::error::{Error, Interrupt, Interrupted};
    use crate::output::checksum::{self, Element};
    use crate::output::{rows, spans};
    use crate::rows::files::RowFile;
    use crate::sampling::{self, random::Generator};
    use crate::statistics::{self, Vectors};

    /// The version of the package, which needs no installed distribution to be asked.
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    pyo3::import_exception!(dump_activations.errors, OutputError);
    pyo3::import_exception!(dump_activations.errors, DatasetError);
    pyo3::import_exception!(dump_activations.errors, InvalidArgumentError);
    pyo3::import_exception!(dump_activations.errors, StepIndexError);

    impl From<Error> for PyErr {
        fn from(error: Error) -> Self {
            let text = error.to_string();
            match error {
                Error::Dataset { .. } | Error::Interrupted(_) => DatasetError::new_err(text),
                Error::StepIndex { .. } => StepIndexError::new_err(text),
                Error::Output(_) => OutputError::new_err(text),
                Error::Argument(_) => InvalidArgumentError::new_err(text),
                Error::Memory(_) => PyMemoryError::new_err(text),
            }
        }
    }

    /// Time between checks for signals: attaching to the interpreter may wait for its other threads.
    const SIGNALS_EVERY: Duration = Duration::from_millis(20);

    /// Tells a read on another thread to end.
    #[pyclass(frozen, module = "dump_activations._rust")]
    struct Cancel {
        asked: AtomicBool,
    }

    #[pymethods]
    impl Cancel {
        #[new]
        fn new() -> Self {
            Self { asked: AtomicBool::new(false) }
        }

        fn ask(&self) {
            self.asked.store(true, Ordering::Relaxed);
        }

        fn is_asked(&self) -> bool {
            self.asked.load(Ordering::Relaxed)
        }
    }

    /// True in the main thread, which runs signal handlers.
    ///
    /// Only it may attach to the interpreter while it works. Other threads still run while the main
    /// thread finalizes the interpreter, and would attach to freed state.
    fn handles_signals(py: Python<'_>) -> PyResult<bool> {
        let threading = py.import("threading")?;
        let main = threading.call_method0("main_thread")?.getattr("ident")?;
        threading.call_method0("get_ident")?.eq(main)
    }

    /// Runs `work` with the interpreter released, and raises the exception of a signal handler.
    fn detached<T: Send>(
        py: Python<'_>,
        cancel: Option<&Bound<'_, Cancel>>,
        work: impl FnOnce(Interrupt<'_>) -> Result<T, Error> + Send,
    ) -> PyResult<T> {
        let cancel = cancel.map(Bound::get);
        let handles_signals = handles_signals(py)?;
        let mut raised = None;
        let outcome = py.detach(|| {
            let mut looked = Instant::now();
            work(&mut || {
                if cancel.is_some_and(Cancel::is_asked) {
                    return Err(Interrupted);
                }
                if !handles_signals || looked.elapsed() < SIGNALS_EVERY {
                    return Ok(());
                }
                let signals = Python::attach(|py| py.check_signals());
                looked = Instant::now();
                signals.map_err(|error| {
                    raised = Some(error);
                    Interrupted
                })
            })
        });
        outcome.map_err(|error| raised.unwrap_or_else(|| error.into()))
    }

    /// A dataset directory whose shards' headers were read. No file is kept open.
    #[pyclass(frozen, module = "dump_activations._rust")]
    struct Dataset {
        dataset: dataset::Dataset,
    }

    #[pymethods]
    impl Dataset {
        /// `names` are the shards in order. `read_layout(path, descr)` is called once per distinct
        /// dtype of rows. It returns the bytes of a row and the offsets of `board`,
        /// `tile_65536_mask` and `exps`, or None.
        #[new]
        fn new(
            py: Python<'_>,
            path: PathBuf,
            names: Vec<OsString>,
            read_layout: &Bound<'_, PyAny>,
        ) -> PyResult<Self> {
            let shards = detached(py, None, |interrupt| Shards::read(&path, &names, interrupt))?;
            let layouts = shards.layouts.iter().map(|layout| {
                type Offset = Option<u32>;
                let found = read_layout.call1(layout.clone())?;
                let (itemsize, board, mask, exps): (usize, Offset, Offset, Offset) =
                    found.extract()?;
                let board = match (board, exps) {
                    (Some(board), _) => BoardField::Packed {
                        board: board as usize,
                        mask: mask.map(|mask| mask as usize),
                    },
                    (None, Some(exps)) => BoardField::Exponents { exps: exps as usize },
                    (None, None) => return Err(argument("read_layout must find board or exps")),
                };
                Ok(Layout { itemsize, board })
            });
            let layouts = layouts.collect::<PyResult<_>>()?;
            Ok(Self { dataset: dataset::Dataset::new(shards, layouts)? })
        }

        #[getter]
        fn path(&self) -> PathBuf {
            self.dataset.path.clone()
        }

        #[getter]
        fn rows(&self) -> u64 {
            self.dataset.rows()
        }

        /// The `descr` text of each shard's header, equal ones as one object.
        #[getter]
        fn descrs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
            let descrs = self.dataset.descrs.iter();
            let texts: Vec<_> = descrs.map(|text| PyString::new(py, text)).collect();
            PyList::new(py, self.dataset.layout_of.iter().map(|&layout| &texts[layout]))
        }

        #[getter]
        fn shards(&self) -> Vec<(PathBuf, u64, u64)> {
            let files = &self.dataset.files;
            let shard = |(shard, file): (usize, &RowFile)| {
                (file.path.clone(), file.rows, files.first(shard))
            };
            files.files().iter().enumerate().map(shard).collect()
        }

        #[pyo3(signature = (indices, out, cancel=None))]
        fn read_boards(
            &self,
            py: Python<'_>,
            indices: &Bound<'_, PyArray1<i64>>,
            out: &Bound<'_, PyArray2<u8>>,
            cancel: Option<&Bound<'_, Cancel>>,
        ) -> PyResult<()> {
            read(py, indices, out, CELLS, cancel, |indices, out, interrupt| {
                self.dataset.read_boards(indices, out, interrupt)
            })
        }

        fn read_rows(
            &self,
            py: Python<'_>,
            indices: &Bound<'_, PyArray1<i64>>,
            out: &Bound<'_, PyArray2<u8>>,
        ) -> PyResult<()> {
            read(py, indices, out, self.dataset.itemsize(), None, |indices, out, interrupt| {
                self.dataset.read_rows(indices, out, interrupt)
            })
        }
    }

    /// The boards and chosen fields of the rows of a dataset.
    #[pyclass(frozen, module = "dump_activations._rust")]
    struct Selection {
        dataset: Py<Dataset>,
        /// One per layout.
        selections: Vec<layouts::Selection>,
    }

    #[pymethods]
    impl Selection {
        /// `fields` are (offset, bytes) in a row, for each of the distinct `descrs` of the dataset.
        #[new]
        fn new(dataset: Bound<'_, Dataset>, fields: Vec<Vec<(u32, u32)>>) -> PyResult<Self> {
            let range = |(offset, bytes)| offset as usize..offset as usize + bytes as usize;
            let fields = fields.into_iter().map(|each| each.into_iter().map(range).collect());
            let selections = dataset.get().dataset.select(fields.collect())?;
            Ok(Self { dataset: dataset.unbind(), selections })
        }

        /// Reads chosen rows: 16 exponents per row, followed by the fields.
        #[pyo3(signature = (indices, out, cancel=None))]
        fn read(
            &self,
            py: Python<'_>,
            indices: &Bound<'_, PyArray1<i64>>,
            out: &Bound<'_, PyArray2<u8>>,
            cancel: Option<&Bound<'_, Cancel>>,
        ) -> PyResult<()> {
            let width = self.selections[0].width();
            read(py, indices, out, width, cancel, |indices, out, interrupt| {
                let dataset = &self.dataset.get().dataset;
                dataset.read_selected(indices, &self.selections, out, interrupt)
            })
        }

        /// Reads the rows from one up to another into `boards`, if given, and a buffer per field.
        ///
        /// One read takes as many rows as `scratch` holds.
        #[pyo3(signature = (rows, scratch, boards, out, cancel=None))]
        fn scan(
            &self,
            py: Python<'_>,
            rows: (u64, u64),
            scratch: &Bound<'_, PyArray1<u8>>,
            boards: Option<&Bound<'_, PyArray2<u8>>>,
            out: Vec<Bound<'_, PyArray2<u8>>>,
            cancel: Option<&Bound<'_, Cancel>>,
        ) -> PyResult<()> {
            let dataset = &self.dataset.get().dataset;
            let (first, stop) = rows;
            let count = stop.saturating_sub(first) as usize;
            let widths = self.selections[0].fields.iter().map(Range::len);
            let widths = boards.iter().map(|_| CELLS).chain(widths);
            let arrays: Vec<_> = boards.into_iter().chain(&out).collect();
            let shapes = arrays.iter().map(|array| array.shape().to_vec());
            let fit = shapes.eq(widths.map(|width| vec![count, width]))
                && arrays.iter().all(|array| array.is_c_contiguous());
            if first > stop || stop > dataset.rows() || !fit {
                let text = format!(
                    "boards and out must be C-contiguous arrays for rows {first} to {stop} of {}, \
                     one per field",
                    dataset.rows()
                );
                return Err(argument(text));
            }
            let mut scratch = scratch.try_readwrite().map_err(not_usable("scratch"))?;
            let scratch = scratch.as_slice_mut().map_err(not_usable("scratch"))?;
            if dataset.files.files().iter().any(|file| file.itemsize > scratch.len()) {
                return Err(argument("scratch must hold one row"));
            }
            let borrowed = arrays.into_iter().map(|array| array.try_readwrite());
            let mut borrowed: Vec<PyReadwriteArray2<'_, u8>> =
                borrowed.collect::<Result<_, _>>().map_err(not_usable("out"))?;
            let slices = borrowed.iter_mut().map(|array| array.as_slice_mut());
            let mut slices =
                slices.collect::<Result<Vec<_>, _>>().map_err(not_usable("out"))?.into_iter();
            let boards = boards.and_then(|_| slices.next());
            let mut columns = Columns { boards, fields: slices.collect() };
            detached(py, cancel, |interrupt| {
                let selections = &self.selections;
                dataset.read_columns(first..stop, selections, scratch, &mut columns, interrupt)
            })
        }
    }

    /// A tensor in finished files, in equal parts of its rows. No file is kept open.
    #[pyclass(frozen, module = "dump_activations._rust")]
    struct StoredTensor {
        tensor: rows::StoredTensor,
    }

    #[pymethods]
    impl StoredTensor {
        /// `places` are (path, offset of the data, rows) of each file. A row is `parts` parts.
        #[new]
        fn new(
            name: String,
            places: Vec<(PathBuf, u64, u64)>,
            parts: u64,
            part_nbytes: usize,
        ) -> PyResult<Self> {
            Ok(Self { tensor: rows::StoredTensor::open(name, places, parts, part_nbytes)? })
        }

        /// Reads chosen parts, counted through all rows.
        #[pyo3(signature = (parts, out, *, threads, cancel=None))]
        fn read(
            &self,
            py: Python<'_>,
            parts: &Bound<'_, PyArray1<i64>>,
            out: &Bound<'_, PyArray2<u8>>,
            threads: Option<usize>,
            cancel: Option<&Bound<'_, Cancel>>,
        ) -> PyResult<()> {
            read(py, parts, out, self.tensor.nbytes(), cancel, |parts, out, interrupt| {
                self.tensor.read(parts, out, threads, interrupt)
            })
        }
    }

    /// Checks that `out` has `width` bytes for each index, and lets `work` fill it.
    ///
    /// The borrows hold references to both arrays, so that `ndarray.resize` refuses to move them.
    fn read(
        py: Python<'_>,
        indices: &Bound<'_, PyArray1<i64>>,
        out: &Bound<'_, PyArray2<u8>>,
        width: usize,
        cancel: Option<&Bound<'_, Cancel>>,
        work: impl FnOnce(&[i64], &mut [u8], Interrupt<'_>) -> Result<(), Error> + Send,
    ) -> PyResult<()> {
        let shape = [indices.len(), width];
        if out.shape() != shape || !out.is_c_contiguous() {
            let text = format!(
                "out must be a C-contiguous array of shape {shape:?}; got shape {:?}",
                out.shape()
            );
            return Err(argument(text));
        }
        let indices: PyReadonlyArray1<'_, i64> =
            indices.try_readonly().map_err(not_usable("indices"))?;
        let indices = indices.as_slice().map_err(not_usable("indices"))?;
        let mut out: PyReadwriteArray2<'_, u8> = out.try_readwrite().map_err(not_usable("out"))?;
        let out = out.as_slice_mut().map_err(not_usable("out"))?;
        detached(py, cancel, |interrupt| work(indices, out, interrupt))
    }

    fn argument(text: impl Into<String>) -> PyErr {
        InvalidArgumentError::new_err(text.into())
    }

    fn not_usable<E: std::fmt::Display>(name: &'static str) -> impl Fn(E) -> PyErr {
        move |error| argument(format!("{name}: {error}"))
    }

    /// `Generator.choice(population, size=len(out), replace=False)` of a fresh `default_rng`, by the
    /// `state` and `inc` of its PCG64, for more than a fiftieth of more than 10,000.
    #[pyfunction]
    fn shuffle_tail(
        py: Python<'_>,
        population: u64,
        state: u128,
        increment: u128,
        out: &Bound<'_, PyArray1<i64>>,
    ) -> PyResult<()> {
        let mut out = out.try_readwrite().map_err(not_usable("out"))?;
        let out = out.as_slice_mut().map_err(not_usable("out"))?;
        let generator = Generator::new(state, increment);
        detached(py, None, |interrupt| {
            sampling::shuffle_tail(population, generator, out, interrupt)
        })
    }

    /// `Generator.permutation(len(out))` of a fresh `default_rng`, in half the time and without the
    /// interpreter, by the `state` and `inc` of its PCG64.
    #[pyfunction]
    fn permutation(
        py: Python<'_>,
        state: u128,
        increment: u128,
        out: &Bound<'_, PyArray1<i64>>,
    ) -> PyResult<()> {
        let mut out = out.try_readwrite().map_err(not_usable("out"))?;
        let out = out.as_slice_mut().map_err(not_usable("out"))?;
        py.detach(|| Generator::new(state, increment).permute(out));
        Ok(())
    }

    fn element(dtype: &str) -> PyResult<Element> {
        Element::from_dtype(dtype)
            .ok_or_else(|| argument(format!("dtype must be one of a tensor; got {dtype}")))
    }

    /// An `OSError` with the system's number and text, as Python itself raises it.
    fn os_error(error: io::Error) -> PyErr {
        let text = error.to_string();
        match error.raw_os_error() {
            None if error.kind() == io::ErrorKind::OutOfMemory => PyMemoryError::new_err(text),
            Some(number) => {
                let reason = text.trim_end_matches(&format!(" (os error {number})"));
                PyOSError::new_err((number, reason.to_owned()))
            }
            None => PyOSError::new_err((libc::EIO, text)),
        }
    }

    /// The caller's open file, which only the caller closes.
    #[allow(unsafe_code)]
    fn borrow_file(fd: RawFd) -> PyResult<ManuallyDrop<File>> {
        // Rust's descriptors are never negative.
        if fd < 0 {
            return Err(os_error(io::Error::from_raw_os_error(libc::EBADF)));
        }
        // SAFETY: it is never closed here. The caller keeps the descriptor open during the call, and
        // a stale one gives EBADF.
        Ok(ManuallyDrop::new(unsafe { File::from_raw_fd(fd) }))
    }

    /// The CRC-32 of two spans of bytes, one after the other.
    #[pyfunction]
    fn combine_crc32(first: u32, second: u32, second_len: u64) -> u32 {
        checksum::combine(first, second, second_len)
    }

    /// Writes uint8 data at an offset and returns its (crc32, nan, inf).
    ///
    /// `direct_fd` is the same file opened with O_DIRECT, which bypasses the page cache.
    #[pyfunction]
    fn write_span(
        py: Python<'_>,
        fd: RawFd,
        direct_fd: Option<RawFd>,
        offset: u64,
        data: &Bound<'_, PyArray1<u8>>,
        dtype: &str,
    ) -> PyResult<(u32, u64, u64)> {
        let element = element(dtype)?;
        let data = data.try_readonly().map_err(not_usable("data"))?;
        let bytes = data.as_slice().map_err(not_usable("data"))?;
        let file = borrow_file(fd)?;
        let direct = direct_fd.map(borrow_file).transpose()?;
        let digest = py
            .detach(|| spans::write_span(&file, direct.as_deref(), offset, bytes, element))
            .map_err(os_error)?;
        Ok(digest.as_tuple())
    }

    /// Reads bytes at an offset and returns their (crc32, nan, inf).
    #[pyfunction]
    fn digest_span(
        py: Python<'_>,
        fd: RawFd,
        offset: u64,
        nbytes: u64,
        dtype: &str,
    ) -> PyResult<(u32, u64, u64)> {
        let element = element(dtype)?;
        let file = borrow_file(fd)?;
        let digest =
            py.detach(|| spans::digest_span(&file, offset, nbytes, element)).map_err(os_error)?;
        Ok(digest.as_tuple())
    }

    /// Measures whole rows of uint8 data, `run` vectors per layer each, into a record per layer;
    /// statistics.rs lists what a record holds.
    #[pyfunction]
    fn measure(
        py: Python<'_>,
        data: &Bound<'_, PyArray1<u8>>,
        dtype: &str,
        run: usize,
        records: &Bound<'_, PyArray2<f64>>,
    ) -> PyResult<()> {
        let element = element(dtype)?;
        let data = data.try_readonly().map_err(not_usable("data"))?;
        let data = data.as_slice().map_err(not_usable("data"))?;
        let (layers, length) = (records.shape()[0], records.shape()[1]);
        let width = length.saturating_sub(statistics::PER_LAYER) / statistics::PER_FEATURE;
        let vectors = Vectors { element, layers, run, width };
        let mut records: PyReadwriteArray2<'_, f64> =
            records.try_readwrite().map_err(not_usable("records"))?;
        let records = records.as_slice_mut().map_err(not_usable("records"))?;
        let nbytes = vectors.row_nbytes();
        if element == Element::Integer
            || nbytes == 0
            || length != vectors.record_len()
            || !data.len().is_multiple_of(nbytes)
        {
            let text = format!("data and records must be of the same {dtype} vectors");
            return Err(InvalidArgumentError::new_err(text));
        }
        py.detach(|| statistics::measure(vectors, data, records));
        Ok(())
    }

    /// True if the file may be opened with O_DIRECT for `write_span`.
    #[pyfunction]
    fn supports_direct(fd: RawFd) -> PyResult<bool> {
        Ok(spans::supports_direct(&*borrow_file(fd)?))
    }

    /// Reserves disk space for a whole file. False if the file system cannot.
    #[pyfunction]
    fn reserve(py: Python<'_>, fd: RawFd, size: u64) -> PyResult<bool> {
        let file = borrow_file(fd)?;
        py.detach(|| spans::reserve(&file, size)).map_err(os_error)
    }
}
