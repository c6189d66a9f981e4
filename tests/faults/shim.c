/* A library to preload: fails or kills the process in a chosen system call on a chosen file.
 *
 * FAULT=<call>:<nth>:<action>:<part of the path>
 *   call    pwrite, write, sync (fsync and fdatasync), rename, unlink, truncate, allocate, or any
 *   nth     counted from 1 over the calls that match, in all threads; 0 for every one of them
 *   action  kill; short (half of a write is done); or the number of an errno
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

static int decide_fd(const char *call, int fd) {
    char link[64], path[4096];
    ssize_t length;
    if (!getenv("FAULT"))
        return GO_ON;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return GO_ON;
    path[length] = 0;
    return decide(call, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define WRITE(name, call, parameters, arguments)                                                   \
    ssize_t name parameters {                                                                      \
        switch (decide_fd(call, fd)) {                                                             \
        case FAIL: return -1;                                                                      \
        case SHORT: length = (length + 1) / 2;                                                     \
        }                                                                                          \
        return REAL(name) arguments;                                                               \
    }

#define ON_FD(name, call, parameters, arguments)                                                   \
    int name parameters {                                                                          \
        return decide_fd(call, fd) == FAIL ? -1 : REAL(name) arguments;                            \
    }

#define ON_PATH(name, call, parameters, arguments)                                                 \
    int name parameters {                                                                          \
        return decide(call, path) == FAIL ? -1 : REAL(name) arguments;                             \
    }

WRITE(write, "write", (int fd, const void *data, size_t length), (fd, data, length))
WRITE(pwrite, "pwrite", (int fd, const void *data, size_t length, off_t at), (fd, data, length, at))
WRITE(pwrite64, "pwrite", (int fd, const void *data, size_t length, off64_t at),
      (fd, data, length, at))
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
