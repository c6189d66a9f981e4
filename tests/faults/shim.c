/* A library to preload: fails, kills the process in or traces chosen system calls on chosen files.
 *
 * FAULT=<call>:<nth>:<action>:<part of the path>
 *   call    pwrite, write, sync (fsync and fdatasync), rename, unlink, truncate, allocate, or any
 *   nth     counted from 1 over the calls that match, in all threads; 0 for every one of them
 *   action  kill; short (half of a write is done); or the number of an errno
 *
 * TRACE=<log>:<part of the path>
 *   appends a line for each write, when it is done, and for each fsync, fdatasync and rename, when
 *   it begins: call, offset (-1 where there is none), length, path
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { GO_ON, SHORT, FAIL };

static int decide(const char *call, const char *path) {
    static atomic_long seen;
    const char *fault = getenv("FAULT");
    char wanted[16], action[16], part[4096];
    long nth;
    if (!fault || sscanf(fault, "%15[^:]:%ld:%15[^:]:%4095[^\n]", wanted, &nth, action, part) != 4)
        return GO_ON;
    if (!strstr(path, part) || (strcmp(wanted, "any") && strcmp(wanted, call)))
        return GO_ON;
    if (nth && atomic_fetch_add(&seen, 1) + 1 != nth)
        return GO_ON;
    if (!strcmp(action, "short"))
        return SHORT;
    if (!strcmp(action, "kill"))
        raise(SIGKILL);
    errno = atoi(action);
    return FAIL;
}

static int path_of(int fd, char *path, size_t size) {
    char link[64];
    ssize_t length;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, size - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return 1;
}

static int decide_fd(const char *call, int fd) {
    char path[4096];
    return getenv("FAULT") && path_of(fd, path, sizeof path) ? decide(call, path) : GO_ON;
}

static void trace(const char *call, const char *path, long long at, long long length) {
    char log[4096], part[4096];
    const char *wanted = getenv("TRACE");
    int saved = errno, fd;
    if (!wanted || sscanf(wanted, "%4095[^:]:%4095[^\n]", log, part) != 2 || !strstr(path, part))
        return;
    fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);
    dprintf(fd, "%s %lld %lld %s\n", call, at, length, path);
    close(fd);
    errno = saved;
}

static void trace_fd(const char *call, int fd, long long at, long long length) {
    char path[4096];
    if (getenv("TRACE") && path_of(fd, path, sizeof path))
        trace(call, path, at, length);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define WRITE(name, call, parameters, arguments, at)                                               \
    ssize_t name parameters {                                                                      \
        ssize_t done;                                                                              \
        switch (decide_fd(call, fd)) {                                                             \
        case FAIL: return -1;                                                                      \
        case SHORT: length = (length + 1) / 2;                                                     \
        }                                                                                          \
        done = REAL(name) arguments;                                                               \
        trace_fd(call, fd, at, done);                                                              \
        return done;                                                                               \
    }

#define ON_FD(name, call, parameters, arguments)                                                   \
    int name parameters {                                                                          \
        trace_fd(#name, fd, -1, 0);                                                                \
        return decide_fd(call, fd) == FAIL ? -1 : REAL(name) arguments;                            \
    }

#define ON_PATH(name, call, parameters, arguments)                                                 \
    int name parameters {                                                                          \
        trace(#name, path, -1, 0);                                                                 \
        return decide(call, path) == FAIL ? -1 : REAL(name) arguments;                             \
    }

WRITE(write, "write", (int fd, const void *data, size_t length), (fd, data, length), -1)
WRITE(pwrite, "pwrite", (int fd, const void *data, size_t length, off_t at), (fd, data, length, at),
      at)
WRITE(pwrite64, "pwrite", (int fd, const void *data, size_t length, off64_t at),
      (fd, data, length, at), at)
ON_FD(fsync, "sync", (int fd), (fd))
ON_FD(fdatasync, "sync", (int fd), (fd))
ON_FD(ftruncate, "truncate", (int fd, off_t size), (fd, size))
ON_FD(ftruncate64, "truncate", (int fd, off64_t size), (fd, size))
ON_FD(fallocate, "allocate", (int fd, int mode, off_t at, off_t size), (fd, mode, at, size))
ON_FD(fallocate64, "allocate", (int fd, int mode, off64_t at, off64_t size), (fd, mode, at, size))
ON_PATH(rename, "rename", (const char *path, const char *to), (path, to))
ON_PATH(unlink, "unlink", (const char *path), (path))

/* These return the error instead of setting errno. */
int posix_fallocate(int fd, off_t at, off_t size) {
    return decide_fd("allocate", fd) == FAIL ? errno : REAL(posix_fallocate)(fd, at, size);
}
int posix_fallocate64(int fd, off64_t at, off64_t size) {
    return decide_fd("allocate", fd) == FAIL ? errno : REAL(posix_fallocate64)(fd, at, size);
}
